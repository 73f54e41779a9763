"""A local search engine: BM25 over documents of one's own.

In: documents, from memory, a folder of text files or a JSON-lines file. Out: a back end for the
search tool. Long documents are indexed in passages, and a result shows the passage that fits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from axpo_jax.agent.tools.search import Hit

_SUFFIXES = (".txt", ".md", ".rst")
PASSAGE_WORDS = 200


class CorpusError(ValueError):
  """Documents that cannot be read; the message names the file and line."""


@dataclasses.dataclass(frozen=True)
class Document:
  """One text. `url`: where it is from, as shown to the policy."""

  title: str
  text: str
  url: str = ""


def read_documents(path: str | os.PathLike) -> list[Document]:
  """Documents of a folder (text and Markdown files, at any depth) or of a `.jsonl` file.

  A line of the latter is an object with "text", and "title" and "url" where there are any.

  Raises:
    CorpusError: nothing is there, or a line is damaged.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    found = [Document(file.stem, file.read_text("utf-8", "replace"),
                      file.relative_to(path).as_posix()) for file in files]
  elif path.suffix == ".jsonl" and path.is_file():
    found = list(_lines(path))
  else:
    raise CorpusError(f"{path} is neither a folder nor a .jsonl file")
  if not found:
    raise CorpusError(f"{path} holds no documents ({', '.join(_SUFFIXES)})")
  return found


def _lines(path: pathlib.Path) -> Iterator[Document]:
  with path.open(encoding="utf-8-sig") as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
        yield Document(str(record.get("title", "")), str(record["text"]), str(record.get("url", "")))
      except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorpusError(f"{path}, line {number}: {type(error).__name__} {error}; a line is an "
                          'object with "text"') from error


class LocalSearch:
  """The back end. Holds the index in memory.

  Args:
    documents: what to search.
    passage_words: words of a passage.
  """

  waits = False  # searching the index takes milliseconds

  def __init__(self, documents: Iterable[Document], *, passage_words: int = PASSAGE_WORDS):
    try:
      import bm25s
    except ImportError as error:
      raise ImportError("the local search needs bm25s: pip install 'axpo_jax[tools]'") from error
    self._bm25s = bm25s
    self._passages = [passage for document in documents
                      for passage in _passages(document, passage_words)]
    if not self._passages:
      raise CorpusError("there are no documents to search")
    # Its other back ends would load jax or compile, neither of which a small index is worth.
    self._index = bm25s.BM25(backend="numpy")
    self._index.index(self._tokens([f"{hit.title}\n{hit.content}" for hit in self._passages]),
                      show_progress=False)

  async def search(self, query: str, max_results: int) -> Sequence[Hit]:
    """The passages that share words with the query, at most one a document."""
    tokens = self._tokens([query])
    if not tokens[0]:
      return []
    # More than asked for, since a document may come with several passages.
    found, scores = self._index.retrieve(
      tokens, corpus=self._passages, k=min(4 * max_results, len(self._passages)),
      show_progress=False, backend_selection="numpy")
    best: dict[tuple[str, str], Hit] = {}
    for hit, score in zip(found[0], scores[0]):
      if score > 0:
        best.setdefault((hit.title, hit.url), hit)
    return list(best.values())[:max_results]

  def _tokens(self, texts: list[str]) -> list[list[str]]:
    return self._bm25s.tokenize(texts, return_ids=False, show_progress=False)


def _passages(document: Document, words: int) -> list[Hit]:
  split = document.text.split()
  if len(split) <= words:
    return [Hit(document.title, document.url, document.text)]
  return [Hit(document.title, document.url, " ".join(split[at:at + words]))
          for at in range(0, len(split), words)]
