"""Long texts cut in the middle: what a page or a program says first and last matters most."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def middle_cutter(max_tokens: int, encode: Callable[[str], Sequence[int]],
                  decode: Callable[[Sequence[int]], str]) -> Callable[[str], str]:
  """A function that leaves `max_tokens` tokens of a text and says how many it took out.

  Args:
    max_tokens: of the text that is kept, the note about the cut not counted.
    encode: text to ids; must not take special tokens out of the text (`Chat.encode_plain`).
    decode: ids to text.

  Raises:
    ValueError: `max_tokens` is less than 2.
  """
  if max_tokens < 2:
    raise ValueError(f"max_tokens={max_tokens}: at least 2, one for each end")

  def cut(text: str) -> str:
    if len(text.encode("utf-8", "replace")) <= max_tokens:  # a token is at least a byte
      return text
    ids = encode(text)
    if len(ids) <= max_tokens:
      return text
    head, tail = max_tokens - max_tokens // 2, max_tokens // 2
    # A character that was cut in two decodes to the replacement mark: drop it.
    first, last = decode(ids[:head]).rstrip("\ufffd"), decode(ids[-tail:]).lstrip("\ufffd")
    return f"{first}\n[... {len(ids) - max_tokens} tokens cut ...]\n{last}"

  return cut
