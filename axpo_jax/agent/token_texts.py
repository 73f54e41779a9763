"""The text of every single token, for whoever shows tokens one by one.

In: token ids and a decoder. Out: one string a token; joined, they are the text of the whole.
"""

from collections.abc import Callable, Sequence

_UNDECODED = "\ufffd"
_LONGEST = 4  # bytes, so tokens, of one character in UTF-8


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str],
                known: dict[int, str] | None = None) -> list[str]:
  """Texts of tokens. A character that is spread over several tokens goes to the last of them,
  and the others are empty.

  Args:
    ids: token ids.
    decode: ids to text, special tokens kept.
    known: texts of single ids, which many calls may share; filled as ids are met.
  """
  known = {} if known is None else known
  out, pending = [], []
  for i in ids:
    if i not in known:
      known[i] = decode([i])
    if not pending and _UNDECODED not in known[i]:
      out.append(known[i])
      continue
    pending.append(i)
    text = decode(pending)
    if _UNDECODED not in text:
      out += [""] * (len(pending) - 1) + [text]
      pending = []
    elif len(pending) == _LONGEST:  # no character: the sampler drew bytes that are none
      out += [known[pending.pop(0)]]
  return out + [known[i] for i in pending]
