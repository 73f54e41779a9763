"""Paths that may lie on an object store: `gs://bucket/run` wherever a run reads or writes.

In: a path as a user writes it. Out: an `epath.Path`, which is local or remote. An object store has
neither folders, nor renaming, nor appending. So whoever writes uses what is here:

- `write_bytes`, `write_text`: a file that is there whole or not at all. An upload that is cut off
  leaves no object; locally a temporary file is renamed.
- `upload`: a folder of files, of which one goes last: who finds that one finds the others.
- `local`, `scratch`: a folder on this machine for what must have one (safetensors, tokenizers, SGLang).

Files that grow have writers of their own: `stages.metrics`, `agent.tools.audit`.
"""

from __future__ import annotations

import atexit
import fnmatch
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable

from etils import epath

from axpo_jax.errors import ConfigError

# Scheme -> the package that reaches it, and the extra in setup.py that installs it.
STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# orbax writes checkpoints to these and to no other store.
CHECKPOINT_STORES = ("gs",)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
# What `local` has copied and `upload` has sent: path, names -> where it is on this machine.
_copies: dict[tuple[str, tuple[str, ...] | None], pathlib.Path] = {}


def parse(text: str | os.PathLike, field: str = "path") -> epath.Path:
  """The path that `text` names.

  Args:
    field: what the text was given as, for the message.

  Raises:
    ConfigError: a scheme that is none of `STORES`, a URL without a bucket, or a store whose package
      is not installed.
  """
  text = os.fspath(text)
  if not (found := _SCHEME.match(text)):
    return epath.Path(text)
  scheme = found[1]
  if scheme not in STORES:
    raise ConfigError(f"{field}={text!r}: {scheme}: is no store that can be used; give a local folder or "
                      f"{' or '.join(f'{known}://bucket/...' for known in STORES)}")
  if not re.match(rf"{scheme}://[^/]+", text):
    raise ConfigError(f"{field}={text!r} names no bucket: write {scheme}://bucket/...")
  package, extra = STORES[scheme]
  if importlib.util.find_spec(package) is None:
    raise ConfigError(f"{field}={text!r} needs the package {package}: pip install -e '.[{extra}]'")
  _without_listings()
  return epath.Path(text)


def workdir(text: str | os.PathLike) -> epath.Path:
  """The folder of a run: a path that checkpoints can be written to.

  Raises:
    ConfigError: see `parse`.
  """
  root = parse(text, "--workdir")
  scheme = os.fspath(root).partition("://")[0]
  if is_remote(root) and scheme not in CHECKPOINT_STORES:
    raise ConfigError(
      f"--workdir={str(root)!r}: checkpoints cannot be written to {scheme}://; give a bucket of "
      f"{' or '.join(f'{store}://' for store in CHECKPOINT_STORES)}, or a folder where it is mounted")
  return root


def check_store(root: epath.Path) -> None:
  """Writes an object below a run's folder, if that is on a store, and removes it.

  Raises:
    ConfigError: it cannot be reached, has no such bucket, or the credentials here do not suffice.
  """
  if not is_remote(root):
    return
  probe = root / ".probe"
  try:
    write_bytes(probe, b"")
    probe.unlink()
  except Exception as error:  # of the package that reaches the store, whatever they are
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ConfigError(f"--workdir={str(root)!r} cannot be written to ({reason}): is there such a bucket, and "
                      "may it be written with the credentials here?") from error


def is_remote(path: str | os.PathLike) -> bool:
  return "://" in os.fspath(path)


def is_file(path: epath.Path) -> bool:
  """Whether it can be read to an end: epath takes pipes and devices for files too."""
  return path.is_file() if is_remote(path) else pathlib.Path(path).is_file()


def within(folder: epath.Path, name: str) -> epath.Path:
  """The path `name` in a folder, for names that come from a file and not from the user.

  Raises:
    ValueError: it leads out of the folder, by "..", as an absolute path or through a symbolic link.
      Links into the cache that a snapshot of huggingface_hub belongs to stay allowed.
  """
  path = folder / name
  if is_remote(folder):
    if ".." in pathlib.PurePosixPath(name).parts or not path.is_relative_to(folder):
      raise ValueError(f"{name!r} leaves {folder}")
    return path
  roots = [os.path.realpath(folder)]
  roots += [os.path.realpath(above.parent / "blobs") for above in epath.Path(os.path.abspath(folder)).parents
            if above.name == "snapshots"]
  real = pathlib.Path(os.path.realpath(path))
  if not any(real.is_relative_to(root) for root in roots):
    raise ValueError(f"{name!r} leaves {folder}")
  return path


def make(folder: epath.Path) -> None:
  """Makes a folder and those above it; an object store has none."""
  if not is_remote(folder):
    folder.mkdir(parents=True, exist_ok=True)


def glob(folder: epath.Path, pattern: str) -> list[epath.Path]:
  """What is in a folder under names of a pattern, sorted; nothing if there is no folder."""
  # Not `folder.glob`: there a "[" in the folder's own name is a pattern too.
  if not folder.is_dir():
    return []
  return sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def files_below(folder: epath.Path) -> list[epath.Path]:
  """All files in a folder and in those below it, sorted."""
  if not is_remote(folder):
    return sorted(epath.Path(path) for path in pathlib.Path(folder).rglob("*") if path.is_file())
  store, path = _store(folder)
  return sorted(epath.Path(store.unstrip_protocol(found)) for found in store.find(path))


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Writes a file whole or not at all: a reader or a crash never meets half of it."""
  if is_remote(path):
    path.write_bytes(data)
    return
  # Threads write the same picture at once where two shards show it.
  temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)


def remove_leftovers(folder: epath.Path) -> None:
  """Removes what a killed process left of `write_bytes` in a folder and in those below it."""
  if not is_remote(folder):
    for leftover in pathlib.Path(folder).rglob(".*.tmp"):
      leftover.unlink()


def upload(folder: pathlib.Path, target: epath.Path, last: str, *, stays: bool = False) -> None:
  """Copies the files of a folder to a store, several at once, but the one called `last` after them.

  Args:
    stays: the folder is there until the process ends, and so is what `local` gives for the target.
  """
  store, path = _store(target)
  names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
  for group in ([name for name in names if name != last], [last]):
    store.put([str(folder / name) for name in group], [f"{path}/{name}" for name in group])
  if stays:
    _copies[os.fspath(target), None] = folder


def move(folder: epath.Path, target: epath.Path, first: str) -> None:
  """Renames a folder. On a store, where that takes a while, it is without the file `first` first."""
  if not is_remote(folder):
    folder.rename(target)
    return
  store, path = _store(folder)
  names = [found.removeprefix(path) for found in store.find(path)]
  store.copy([path + name for name in names], [_store(target)[1] + name for name in names])
  store.rm_file(f"{path}/{first}")
  store.rm(path, recursive=True)
  _copies.pop((os.fspath(folder), None), None)


def local(path: str | os.PathLike, only: Iterable[str] | None = None) -> pathlib.Path:
  """A file or folder on this machine: itself, or a copy that lasts until the process ends.

  Args:
    path: copied once, if it lies on a store.
    only: of a folder, the names that are wanted; None: everything in it.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  key = os.fspath(path), None if only is None else tuple(only)
  if key not in _copies:
    _copies[key] = _copied(*key)
  return _copies[key]


def _copied(path: str, only: tuple[str, ...] | None) -> pathlib.Path:
  store, source = _store(path)
  into = pathlib.Path(tempfile.mkdtemp(dir=_temporary())) / epath.Path(path).name
  if store.isfile(source):
    names = [""]
  else:
    names = [found.removeprefix(source.rstrip("/")) for found in store.find(source)]
    names = [name for name in names if only is None or name[1:] in only]
    into.mkdir()
  if names:
    store.get([source.rstrip("/") + name for name in names], [f"{into}{name}" for name in names])
  return into


@functools.cache
def scratch(folder: epath.Path) -> pathlib.Path:
  """A folder of this machine in the place of `folder`: itself, or an empty one that is removed when
  the process ends."""
  if not is_remote(folder):
    return pathlib.Path(folder)
  return pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}_", dir=_temporary()))


@functools.cache
def _temporary() -> pathlib.Path:
  """In $TMPDIR, which must have room for a policy if the run is on a store."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="axpo_jax_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def _store(path: str | os.PathLike):
  """The fsspec file system of a path, and the path in it."""
  import fsspec  # only who uses a store needs it

  _without_listings()
  return fsspec.core.url_to_fs(os.fspath(path))


@functools.cache
def _without_listings() -> None:
  """fsspec remembers what a folder held; other processes and orbax change it meanwhile."""
  import fsspec

  for names in (("gs", "gcs"), ("s3", "s3a")):
    for name in names:
      fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
