"""What the site needs beyond Markdown: README as its first page, and links into the code.

A page may link to a file of the repository ([config.py](../axpo_jax/config.py)): the build fails if it is not
there. With `extra.source_url` in mkdocs.yml such a link leads there, without one its text alone is left.
"""

import pathlib
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
  """The index is README, as seen from docs/."""
  text = (ROOT / "README.md").read_text()
  text = re.sub(r"\]\(docs/", "](", text)
  text = _LINK.sub(lambda match: match[0] if (ROOT / "docs" / match[2]).exists()
                   else f"[{match[1]}](../{match[2]}{match[3] or ''})", text)
  files.append(File.generated(config, "index.md", content=text))
  return files


def on_page_markdown(markdown, page, config, files):
  def into_code(match: re.Match) -> str:
    text, target = match[1], match[2]
    if not target.startswith("../"):
      return match[0]
    file = (ROOT / "docs" / target).resolve()
    if not file.exists():
      raise PluginError(f"{page.file.src_path} links to {target}, which is not there")
    source = config.extra.get("source_url")
    return f"[{text}]({source}/{file.relative_to(ROOT)}{match[3] or ''})" if source else text
  return _LINK.sub(into_code, markdown)
