"""Names on the Hugging Face hub instead of folders: `Qwen/Qwen3-VL-8B-Thinking`, or `...@REVISION`.

In: a config. Out: the same config, with the folder of the downloaded snapshot where a field named a repository.
A folder of that name on this machine has precedence. Downloads are kept in the hub's own cache (`HF_HOME`) and found
there again without a network; `HF_ENDPOINT` names a mirror, `HF_TOKEN` opens gated repositories.
"""

from __future__ import annotations

import os
import pathlib
import re

from ml_collections import ConfigDict

from axpo_jax.errors import ConfigError

# Field -> what it names, as the hub calls it.
FIELDS = {"model.checkpoint": "model", "model.tokenizer": "model", "data.path": "dataset",
          "data.eval_path": "dataset", "sft.path": "dataset"}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?")
# Of a model: not the same weights in other formats, which may double the download.
_MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def is_id(text: str) -> bool:
  """Whether a text can be a repository's name, and no file or folder is called so."""
  return bool(_ID.fullmatch(text)) and not pathlib.Path(text).exists()


def fetch_named(config: ConfigDict) -> None:
  """Downloads what the fields of `FIELDS` name on the hub, and puts the folders into the config.

  Raises:
    ConfigError: one line: the field, the name, why it is not there and what to do.
  """
  for field, kind in FIELDS.items():
    section, name = field.split(".")
    if is_id(config[section][name]):
      config[section][name] = snapshot(config[section][name], kind, f"config.{field}")


def snapshot(name: str, kind: str, field: str) -> str:
  """The folder of a repository's snapshot: the newest one, or that of the revision behind an "@".

  Raises:
    ConfigError: see `fetch_named`.
  """
  # Imported here: it takes half a second, and runs on local folders need none of it.
  import huggingface_hub
  from huggingface_hub import errors

  where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
  name, _, revision = name.partition("@")
  try:
    return huggingface_hub.snapshot_download(
      name, repo_type=kind, revision=revision or None, allow_patterns=_MODEL_FILES if kind == "model" else None)
  except errors.GatedRepoError as error:
    raise ConfigError(f"{field}={name!r}: the {kind} is gated: accept its terms at {where}/{name}, and set "
                      "HF_TOKEN") from error
  except errors.RevisionNotFoundError as error:
    raise ConfigError(f"{field}={name!r}: {where} has this {kind}, but no revision {revision!r}") from error
  except errors.RepositoryNotFoundError as error:
    raise ConfigError(f"{field}={name!r}: there is no such folder here, and no such {kind} at {where} (of a private "
                      "one, set HF_TOKEN)") from error
  except Exception as error:  # the network's and the hub's, whatever they are
    option = " --repo-type dataset" if kind == "dataset" else ""
    option += f" --revision {revision}" if revision else ""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ConfigError(
      f"{field}={name!r}: there is no such folder here, and {where} does not give the {kind} ({reason}): run "
      f"`hf download {name}{option}` where there is a network, and name the folder that it prints") from error
