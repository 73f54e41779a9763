"""Errors that end a run with one line on stderr: the launchers print the message, not a traceback."""


class ConfigError(ValueError):
  """Invalid config value. The message names the field and how to fix it."""


class RunStopped(RuntimeError):
  """The run stopped itself, since going on would be of no use. The message says why."""
