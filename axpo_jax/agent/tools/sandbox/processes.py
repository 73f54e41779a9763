"""The family of a process, read from a /proc folder that is open as a descriptor."""

from __future__ import annotations

import os


def children(pid: int, proc: int) -> list[int]:
  """Children of all threads of a process; none where there is no such process."""
  found: list[int] = []
  try:
    folder = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    try:
      threads = os.listdir(folder)
    finally:
      os.close(folder)
  except OSError:
    return []
  for thread in threads:
    try:
      with open(os.open(f"{pid}/task/{thread}/children", os.O_RDONLY, dir_fd=proc)) as file:
        found += [int(child) for child in file.read().split()]
    except (OSError, ValueError):  # the thread has ended
      continue
  return found


def descendants(pid: int, proc: int) -> list[int]:
  """Children, their children and so on; parents come first."""
  family = children(pid, proc)
  for child in family:  # grows while it is walked
    family += children(child, proc)
  return family
