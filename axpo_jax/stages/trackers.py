"""Experiment trackers beside metrics.jsonl: Weights & Biases and trackio, which share one interface.

In: the run's config, its lines of metrics, and rollouts for a table with pictures. Out: one run of the tracker for
all stages of a run; a resumed run continues there. A tracker only holds a copy: if it fails after its start, the
error is logged once and the run continues. Its own environment variables say where it sends the data
(WANDB_API_KEY, WANDB_MODE=offline, TRACKIO_SPACE_ID, …).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.agent.rollout import Rollout
from axpo_jax.errors import ConfigError
from axpo_jax.model.chat import Chat

COLUMNS = ("question", "kind", "image", "crop", "trajectory", "answer", "gold", "reward", "calls")
_ROWS = 32  # of a step's table
_CHARACTERS = 20_000  # of a trajectory in it
_SIDE = 512  # pixels of a picture's longer side


class Tracker:
  """One tracker's run.

  Args:
    name: the package, "wandb" or "trackio".
    config: of the run.
    root: the run's folder. A file in it holds the tracker's id of the run, so that a resumed run continues there.

  Raises:
    ConfigError: the package is missing, or refuses to start (no key, no network).
  """

  def __init__(self, name: str, config: ConfigDict, root: epath.Path):
    self.name, self._failed = name, False
    try:
      self._module = importlib.import_module(name)
    except ImportError as error:
      raise ConfigError(f"config.log.trackers names {name!r}: pip install {name}") from error
    run_id = _run_id(root)
    options: dict[str, Any] = {"project": config.log.project, "config": config.to_dict(), "resume": "allow"}
    if name == "wandb":
      options |= {"id": run_id, "name": root.name, "dir": str(paths.scratch(root)),
                  "settings": self._module.Settings(silent=True)}
    else:  # trackio knows runs by their names
      options |= {"name": f"{root.name}-{run_id}", "embed": False}
    try:
      self._run = self._module.init(**options)
    except Exception as error:  # of the network, of a login, whatever the package raises
      reason = " ".join(str(error).split())[:300]
      raise ConfigError(f"config.log.trackers: {name} does not start ({reason}): log in, or leave it out"
                        + (" (WANDB_MODE=offline keeps the run on this machine)" if name == "wandb" else "")
                        ) from error

  def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
    """Sends a line of metrics, without those that have no value at this step."""
    with self._forgiven():
      self._module.log({name: value for name, value in numbers.items() if value is not None}, step=step)

  def table(self, step: int, rollouts: Sequence[tuple[Rollout, Mapping[str, Any]]], chat: Chat) -> None:
    """Sends a table of trajectories with their pictures."""
    with self._forgiven():
      rows = [self._row(rollout, note, chat) for rollout, note in rollouts]
      self._module.log({"rollouts": self._module.Table(columns=list(COLUMNS), data=rows)}, step=step)

  def _row(self, rollout: Rollout, note: Mapping[str, Any], chat: Chat) -> list[Any]:
    shown = rollout.transcript.images
    crops = [image for image in shown if image.origin != "question"]
    text = chat.decode(rollout.transcript.ids[rollout.transcript.prompt_length:])
    kind = f"continuation {note['continuation']} of rollout {note['source']}" if "branch" in note else "rollout"
    return [rollout.question_id, kind, self._picture(shown[:1]), self._picture(crops[-1:]), text[:_CHARACTERS],
            rollout.answer or "", ", ".join(map(str, note.get("gold", ()))), float(rollout.reward),
            len(rollout.calls)]

  def _picture(self, images: Sequence[Any]) -> Any:
    if not images:
      return None
    picture = images[0].shown.picture()
    picture.thumbnail((_SIDE, _SIDE))
    return self._module.Image(picture)

  def close(self) -> None:
    with self._forgiven():
      self._module.finish()

  @contextlib.contextmanager
  def _forgiven(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # a tracker must not end the run
      if not self._failed:
        logging.warning("%s failed, and the run goes on without it: %s", self.name, error)
      self._failed = True


def _run_id(root: epath.Path) -> str:
  """The id of the run in its trackers, the same whenever it is resumed.

  It is random: machines and containers have runs of the same path. And it depends on the path: the copy of a
  run's folder is another run.
  """
  file = root / "tracker_id.txt"
  if not file.exists():
    paths.make(root)
    paths.write_text(file, secrets.token_hex(8) + "\n")
  where = str(root) if paths.is_remote(root) else os.path.abspath(root)
  return hashlib.sha256(f"{where} {file.read_text().strip()}".encode()).hexdigest()[:16]


def start(config: ConfigDict, root: epath.Path) -> list[Tracker]:
  """The trackers that the config names.

  Raises:
    ConfigError: one cannot start.
  """
  return [Tracker(name, config, root) for name in config.log.trackers]


def chosen(rollouts: Sequence[Rollout], notes: Sequence[Mapping[str, Any]]
           ) -> list[tuple[Rollout, Mapping[str, Any]]]:
  """Rollouts for a table: the first ones of every question, equally many of each as far as possible."""
  seen: dict[Any, int] = {}
  ranked = []
  for rollout, note in zip(rollouts, notes, strict=True):
    key = note.get("group"), "branch" in note
    seen[key] = seen.get(key, 0) + 1
    ranked.append((seen[key], len(ranked), (rollout, note)))
  kept = sorted(ranked, key=lambda entry: entry[:2])[:_ROWS]
  return [pair for *_, pair in sorted(kept, key=lambda entry: entry[1])]
