"""Put first on a child's path: a process in which torch is not installed, as users have it."""

import importlib.machinery

_find_spec = importlib.machinery.PathFinder.find_spec


def _without_torch(name, path=None, target=None):
  return None if name == "torch" else _find_spec(name, path, target)


# Not sys.modules["torch"] = None: SciPy takes whatever is there for a module.
importlib.machinery.PathFinder.find_spec = _without_torch
