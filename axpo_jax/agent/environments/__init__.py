"""Environments of other projects, behind `agent.environment`."""
