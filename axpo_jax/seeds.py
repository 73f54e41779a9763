"""Every random choice of a run comes from (config.seed, where in the run it is made).

So there is no hidden random state to save: a resumed run makes the choices of an unbroken one, and
adding rollouts to one question changes nothing for another.
"""

import hashlib


def derive(seed: int, *path: str | int) -> int:
  """A 31-bit seed for the choice named by `path` in the run of `seed`; the same on every machine."""
  text = "/".join(map(str, (seed, *path)))
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
