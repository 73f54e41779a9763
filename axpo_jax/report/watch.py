"""The page of runs that are in progress: a small server on this machine, for one's own browser.

In: the folders of runs. Out: at http://127.0.0.1:PORT the page as `page.render` makes it, made again when the runs
have written more; the browser asks for that every few seconds. Nothing is written to the runs.
"""

from __future__ import annotations

import hashlib
import html
import http.server
import logging
import pathlib
import threading
from collections.abc import Callable, Sequence

from axpo_jax.report.runs import ReportError, Run, load_runs

_PATTERNS = ("metrics.jsonl", "**/step_*.jsonl", "**/rollouts_*.jsonl", "eval/*/records_*.jsonl")
_WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<title>waiting</title><body style="font-family: system-ui; margin: 3rem"><h1>Nothing to show yet</h1><p>{}</p>
<p>This page looks again every three seconds.</p></body></html>"""


class Watched:
  """The newest page of some runs.

  Args:
    folders: of the runs; one that is not there yet is waited for.
    render: makes a page of runs.
  """

  def __init__(self, folders: Sequence[str], render: Callable[[Sequence[Run]], str]):
    self._folders, self._render = list(folders), render
    self._lock = threading.Lock()
    self._made: tuple[str, bytes] | None = None

  def version(self) -> str:
    """A text that changes when the runs have written something."""
    files = sorted(path for folder in map(pathlib.Path, self._folders) for pattern in _PATTERNS
                   for path in folder.glob(pattern))
    seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files if (stat := _stat(path))]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

  def page(self) -> bytes:
    """The page, made anew if the runs have changed since the last one."""
    with self._lock:  # several tabs wait for one rendering
      version = self.version()
      if self._made is None or self._made[0] != version:
        self._made = version, self._new().encode("utf-8", "replace")
      return self._made[1]

  def _new(self) -> str:
    try:
      return self._render(load_runs(self._folders))
    except ReportError as error:  # nothing is written yet
      return _WAITING.format(html.escape(str(error)))
    except Exception as error:  # perhaps a file that is half written: the next change makes the page anew
      logging.exception("the page of %s", self._folders)
      return _WAITING.format(html.escape(f"{type(error).__name__}: {error}"))


def _stat(path: pathlib.Path):
  try:
    return path.stat()
  except OSError:  # removed in between
    return None


def server(watched: Watched, port: int) -> http.server.ThreadingHTTPServer:
  """A server of this machine alone; port 0 takes a free one.

  Raises:
    OSError: the port is taken.
  """
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      # Another site's page must not read a run by a name that leads here.
      if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
        return self.send_error(403)
      found = {"/": lambda: (watched.page(), "text/html"),
               "/version": lambda: (watched.version().encode(), "text/plain")}.get(self.path.partition("?")[0])
      if found is None:
        return self.send_error(404)
      body, kind = found()
      self.send_response(200)
      for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
                          ("Cache-Control", "no-store")):
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
