"""The configuration reference, generated from config.py and the dataclasses that it names.

  python -m axpo_jax.config_reference > docs/configuration.md

In: the source and the defaults of `base_config`. Out: Markdown, a table a section. A field's meaning is the
comment behind it or directly above it in config.py (both if it has both), else its entry in the docstring of
the dataclass that its section is made from.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator

from axpo_jax import config as config_module
from axpo_jax.config import LIMITS, base_config
from axpo_jax.config_queries import fields

_HEAD = """# Configuration

Every field, its default and its meaning. `--config.<section>.<field>=<value>` overrides it on the command line;
the files in `configs/` change only what their names say. Values marked [paper] are those of arXiv 2605.28774.
This page is made from [config.py](../axpo_jax/config.py): `python -m axpo_jax.config_reference > docs/configuration.md`.
"""


def reference() -> str:
  """The whole page."""
  source = inspect.getsource(config_module)
  comments, values = _comments(source), dict(fields(base_config()))
  # A comment in config.py has priority over the dataclass's docstring.
  meanings = {path: _links(comments.get(line) or record).replace("|", "\\|")
              for path, line, record in _entries(ast.parse(source))}
  sections: dict[str, list[str]] = {}
  for path, meaning in meanings.items():
    if path in values:
      section, _, name = path.rpartition(".")
      if meaning == meanings.get(section):
        meaning = ""  # already above the table
      sections.setdefault(section, []).append(f"| `{name}` | `{_shown(values[path])}` | {meaning} |")
  # The limits of "teach" and "screen" follow those of "agent": base_config sets them in a loop.
  missing = {path for path in values.keys() - meanings.keys() if path.split(".")[-1] not in LIMITS}
  if missing:
    raise ValueError(f"config.py defines fields in a way that this module cannot read: {sorted(missing)}")
  parts = [_HEAD]
  for section, rows in sections.items():
    said = f"{meanings[section]}\n\n" if meanings.get(section) else ""
    parts.append(f"\n## {section or 'The run'}\n\n{said}| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
  return "".join(parts)


def _entries(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
  """(dotted name, line, text of its dataclass) of every section and field, in order."""
  functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

  def walk(path: str, line: int, value: ast.expr) -> Iterator[tuple[str, int, str]]:
    name = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    if name == "section":
      yield path, line, ""
      yield from keywords(path, value.keywords)
      yield from record_fields(path, value)
    elif name in functions:
      yield from walk(path, line, functions[name].body[-1].value)
    elif name == "ConfigDict" and value.args:
      yield path, line, ""
      yield from keywords(path, value.args[0].keywords)
    else:
      yield path, line, ""

  def keywords(path: str, found: list[ast.keyword]) -> Iterator[tuple[str, int, str]]:
    for keyword in found:
      yield from walk(f"{path}.{keyword.arg}", keyword.value.lineno, keyword.value)

  def record_fields(path: str, call: ast.Call) -> Iterator[tuple[str, int, str]]:
    record = getattr(config_module, call.args[0].id)
    meanings, own = _meanings(record), {keyword.arg for keyword in call.keywords}
    names = [arg.value for arg in call.args[1:]]
    for name in names or [field.name for field in dataclasses.fields(record)]:
      if name not in own:
        yield f"{path}.{name}", 0, meanings.get(name, "")

  for node in functions["base_config"].body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      yield from walk(node.targets[0].attr, node.lineno, node.value)


def _meanings(record: type) -> dict[str, str]:
  """Field -> its entry in the docstring of a dataclass: `name: text`, or `one, another: text`."""
  known = {field.name for field in dataclasses.fields(record)}
  found: dict[str, str] = {}
  names: list[str] = []
  for line in inspect.getdoc(record).splitlines():
    entry = re.match(r"\s*(\w+(?:, \w+)*): (.*)", line)
    if entry and set(entry[1].split(", ")) <= known:
      names = entry[1].split(", ")
      found |= dict.fromkeys(names, entry[2])
    elif not line.strip():
      names = []
    else:
      found |= {name: f"{found[name]} {line.strip()}" for name in names}
  # Docstrings write (paper) or (paper: the value), which the table shows beside it.
  return {name: re.sub(r"\(paper(: [^)]*)?\)", "[paper]", text) for name, text in found.items()}


def _comments(source: str) -> dict[int, str]:
  """Line of code -> its comment: the lines above it, the text behind it, and lines that continue that text."""
  tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT]
  alone = {token.start[0]: token for token in tokens if token.line.strip().startswith("#")}
  behind = {token.start[0]: token for token in tokens if token.start[0] not in alone}
  found: dict[int, str] = {}
  above: list[str] = []
  continued = None  # a comment behind code that the lines below may go on with
  for number in range(1, source.count("\n") + 1):
    if number in alone:
      token = alone[number]
      if continued and token.start[1] == behind[continued].start[1]:
        found[continued] += f" {_text(token)}"
      else:
        above.append(_text(token))
        continued = None
      continue
    parts = [*above, *([_text(behind[number])] if number in behind else [])]
    if parts:
      found[number] = " ".join(parts)
    above, continued = [], number if number in behind else None
  return found


def _text(token: tokenize.TokenInfo) -> str:
  return token.string.lstrip("#").strip()


def _links(text: str) -> str:
  """Names of documents become links, relative to docs/."""
  return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def _shown(value: object) -> str:
  text = str(value) if isinstance(value, str) and value else repr(value)
  assets = str(config_module.ASSETS)
  return text.replace(assets, "axpo_jax/assets")


if __name__ == "__main__":
  sys.stdout.write(reference())
