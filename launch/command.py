"""Command lines with a config: every error is one line on stderr, with exit code 1.

In: the arguments of a program with the flag --config (a file) and overrides --config.<field>=<value>.
Out: parsed flags. The error of a misspelt field lists similar ones.
"""

import difflib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from axpo_jax import repository
from axpo_jax.config_queries import fields
from axpo_jax.errors import ConfigError, RunStopped
from axpo_jax.rl import recipes


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run(main)`, with one line instead of a traceback for errors that a user can fix."""
  def guarded(argv: list[str]) -> None:
    try:
      main(argv)
    except (app.UsageError, ConfigError, RunStopped) as error:
      _end(error)
  sys.argv[1:] = with_shipped_configs(sys.argv[1:])
  app.run(guarded, flags_parser=_parse)


def with_shipped_configs(arguments: Sequence[str]) -> list[str]:
  """The arguments, with --config=configs/<name>.py replaced by the shipped config if there is no such file.

  So the commands of the documents work in any folder.
  """
  file = _config_file(arguments)
  if file is None or os.path.exists(file) or not (shipped := repository.FOLDER / file).is_file():
    return list(arguments)
  return [argument.replace(file, str(shipped), 1) if argument in (file, f"--config={file}", f"-config={file}")
          else argument for argument in arguments]


def _end(error: Exception) -> None:
  kinds = {ConfigError: "configuration error", RunStopped: "stopped"}
  kind = next((kind for known, kind in kinds.items() if isinstance(error, known)),
              pathlib.Path(sys.argv[0]).name)
  sys.exit(f"{kind}: {one_line(error)}")


def one_line(error: Exception) -> str:
  """An error's message on one line, since those of libraries have several."""
  return " ".join(str(error).split())


def _parse(argv: list[str]) -> list[str]:
  try:
    check_config_flags(argv[1:])
    return flags.FLAGS(argv)
  except (flags.Error, ConfigError, ValueError, TypeError) as error:
    _end(error)


def check_config_flags(arguments: Sequence[str]) -> None:
  """Raises ConfigError for a config file that cannot be loaded, and for overrides of fields that it does not have."""
  file = _config_file(arguments)
  if file is None:
    return
  known = [name for name, _ in fields(read_config([f"--config={file}"]))]
  for argument in arguments:
    if argument == "--":
      return
    name, _, _ = argument.lstrip("-").partition("=")
    if not (argument.startswith("-") and name.startswith("config.")):
      continue
    name = name.removeprefix("config.")
    if name in known or name.removesuffix("!") in known:
      continue
    if any(other.startswith(f"{name}.") for other in known):
      raise ConfigError(f"--config.{name} is a section: set one of its fields, such as "
                        f"--config.{next(k for k in known if k.startswith(f'{name}.'))}")
    raise ConfigError(f"--config.{name}: there is no such field{_nearest(name, known)}")
  _check_recipe([argument for argument in arguments if re.match(r"--?config[.=]", argument)])


def _check_recipe(arguments: Sequence[str]) -> None:
  """Raises ConfigError for an override that contradicts the recipe."""
  rl = read_config(arguments).rl
  try:
    wanted_by_name = recipes.overrides(rl.recipe)
  except ValueError:
    return  # `apply_recipe` raises it, with a list of the recipes
  for name, wanted in wanted_by_name.items():
    value = dict(fields(rl))[name]
    if value != wanted and any(re.match(rf"--?config\.rl\.{re.escape(name)}\b", text) for text in arguments):
      raise ConfigError(f"--config.rl.{name}={value!r}: config.rl.recipe={rl.recipe!r} sets it to {wanted!r}; "
                        "leave one of the two out")


def _nearest(name: str, known: Sequence[str]) -> str:
  last = name.rpartition(".")[2]
  near = [*difflib.get_close_matches(name, known, 2),
          *(other for other in known if other.rpartition(".")[2] == last)]
  return f"; did you mean {' or '.join(f'--config.{other}' for other in dict.fromkeys(near))}?" if near else ""


def _config_file(arguments: Sequence[str]) -> str | None:
  for place, argument in enumerate(arguments):
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      return value if equals else (arguments[place + 1:] or [None])[0]
  return None


def read_config(arguments: Sequence[str]) -> ConfigDict:
  """The config of arguments such as --config=configs/axpo_tiny.py --config.seed=1; no other arguments are allowed.

  Raises:
    ConfigError: the file cannot be loaded.
    flags.Error, ValueError, TypeError: an override does not fit its field.
  """
  file = (_config_file(arguments) or "").partition(":")[0]
  if not os.path.isfile(file):
    raise ConfigError(f"--config={file}: there is no such file")
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
  before, sys.argv = sys.argv, [sys.argv[0], *arguments]  # config_flags reads overrides from there
  try:
    values(sys.argv)
    config = holder.value
    config.is_locked  # noqa: B018 - raises the error of a file that failed to load
    return config
  except (flags.Error, ConfigError):
    raise
  except Exception as error:
    raise ConfigError(_in_file(error, file)) from error
  finally:
    sys.argv = before


def _in_file(error: BaseException, file: str) -> str:
  """The message of an error in a config file, with its line."""
  lines, cause = [], error
  while cause is not None:
    lines += [frame.lineno for frame in traceback.extract_tb(cause.__traceback__)
              if os.path.abspath(frame.filename) == os.path.abspath(file)]
    error, cause = cause, cause.__cause__ or cause.__context__
  where = f"{file}, line {lines[-1]}" if lines else file
  text = " ".join(str(error.args[0] if error.args else error).split())
  if len(text) > 300:  # ml_collections repeats the whole section
    text = f"{text[:150]} ... {text[-100:]}"
  return f"--config={where}: {type(error).__name__}: {text}"
