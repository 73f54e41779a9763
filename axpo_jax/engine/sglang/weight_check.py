"""Whether servers hold the weights that were pushed, by the checksums of their tensors.

In: pushes, and what servers say of their tensors. Out: nothing, or a LoadError that names what differs.

SGLang's `/update_weights_from_disk` skips what it does not know and still succeeds. So: a server's
tensors are those of the model; those that differ from the push before, wherever that was verified, are
those that the push changed; and servers with one layout agree in all of them.
"""

from __future__ import annotations

from axpo_jax.engine.sglang.api import LoadError
from axpo_jax.engine.sglang.weight_push import Push, server_names

Sums = dict[str, str]  # "<rank>/<tensor, as the server calls it>" -> checksum


class WeightCheck:
  """Remembers the checksums of the current push and of the one before, for each layout of servers.

  Args:
    names: of the tensors that a server must hold.
  """

  def __init__(self, names: frozenset[str]):
    self._names, self._tag = names, ""
    # By their keys: servers that split the tensors alike have the same ones.
    self._now: dict[frozenset[str], Sums] = {}
    self._before: dict[frozenset[str], Sums] = {}

  def next_push(self, push: Push) -> None:
    """From now on servers are to hold `push`."""
    self._now, self._before, self._tag = {}, self._now, push.tag

  def check(self, url: str, sums: Sums, push: Push) -> None:
    """Raises LoadError if the server at `url`, which has `sums`, does not hold `push`."""
    if push.tag != self._tag:
      return  # it came back while the weights changed, and must take those of today before it is in
    parameters = (".weight", ".bias", "_weight")  # the last of experts, w13_weight and w2_weight
    found = frozenset(key.partition("/")[2] for key in sums if key.endswith(parameters))
    _agree(f"{url} holds other tensors than the model", found, self._names)
    old = self._before.get(frozenset(sums))
    if old is not None and push.changed is not None:
      changed = frozenset(key.partition("/")[2] for key in sums if sums[key] != old[key])
      _agree(f"{url} did not take the push as written", changed, server_names(push.changed))
    others = self._now.setdefault(frozenset(sums), sums)
    _agree(f"{url} and another server hold different weights",
           frozenset(sums.items()), frozenset(others.items()))


def _agree(what: str, found: frozenset, wanted: frozenset) -> None:
  if wrong := found ^ wanted:
    some = ", ".join(map(str, sorted(wrong)[:5]))
    raise LoadError(f"{what}: {len(wrong)} differ ({some})")
