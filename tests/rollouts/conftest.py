"""The little world of the agent's tests."""

from tests.agent.conftest import replay, scripted, world  # noqa: F401
