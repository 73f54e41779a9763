"""Names on the hub in the place of folders, against a server that speaks what the hub speaks."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

from axpo_jax import hub

REPO = pathlib.Path(hub.__file__).parents[1]
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "qwen3_vl"}', "model.safetensors": b"weights" * 999,
         "pytorch_model.bin": b"the same again", "data/train.jsonl": b'{"question": "?", "answer": "1"}\n'}


class Hub(http.server.BaseHTTPRequestHandler):
  """Two repositories, of a model and a data set, with the same files; and a gated one."""

  asked: list[str] = []  # noqa: RUF012

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.partition("?")[0]
    self.asked.append(path)
    if "/org/gated" in path:
      return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
    if path.endswith("/revision/nowhere"):
      return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    if re.fullmatch(r"/api/(models|datasets)/org/name/revision/\w+", path):
      return self._send(200, json.dumps({"id": "org/name", "sha": SHA, "siblings": [
        {"rfilename": name} for name in FILES]}).encode())
    if re.fullmatch(r"/api/(models|datasets)/org/name/tree/\w+", path):
      return self._send(200, json.dumps([
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in FILES.items()]).encode())
    if found := re.fullmatch(rf"(?:/datasets)?/org/name/resolve/{SHA}/(.*)", path):
      data = FILES[found[1]]
      return self._send(200, data, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
    return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

  def _send(self, status, body, headers=()):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
    Hub.asked.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


CODE = """
import sys
from ml_collections import ConfigDict
from axpo_jax import hub
from axpo_jax.errors import ConfigError
config = ConfigDict({"model": {"checkpoint": "", "tokenizer": ""}, "data": {"path": "", "eval_path": ""},
                     "sft": {"path": ""}})
section, name = sys.argv[1].split(".")
config[section][name] = sys.argv[2]
try:
  hub.fetch_named(config)
  print(config[section][name])
except ConfigError as error:
  print(error, file=sys.stderr)
  sys.exit(2)
"""


def fetch(field, name, home, endpoint, **more):
  """In a process of its own: the hub's library reads its environment when it is imported."""
  environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(REPO),
                 "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
  return subprocess.run([sys.executable, "-c", CODE, field, name], env=environment, capture_output=True,
                        text=True, timeout=120)


def test_a_model_and_a_data_set_by_name(server, tmp_path):
  done = fetch("model.checkpoint", "org/name", tmp_path, server)
  assert done.returncode == 0, done.stderr
  folder = pathlib.Path(done.stdout.strip())
  assert folder.name == SHA and (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
  assert not (folder / "pytorch_model.bin").exists()
  data = pathlib.Path(fetch("data.path", "org/name", tmp_path, server).stdout.strip())
  assert (data / "data" / "train.jsonl").read_bytes() == FILES["data/train.jsonl"]
  assert fetch("model.checkpoint", f"org/name@{SHA}", tmp_path, server).stdout == done.stdout
  # Without a network: what is in the cache.
  again = fetch("model.checkpoint", "org/name", tmp_path, server, HF_HUB_OFFLINE="1")
  assert again.stdout == done.stdout


@pytest.mark.parametrize("field, name, more, words", [
  ("model.checkpoint", "org/other", {}, ["'org/other'", "no such folder here", "no such model at http"]),
  ("data.path", "org/gated", {}, ["'org/gated'", "gated", "HF_TOKEN"]),
  ("model.checkpoint", "org/name@nowhere", {}, ["no revision 'nowhere'"]),
  ("sft.path", "org/name", {"HF_HUB_OFFLINE": "1"}, ["hf download org/name --repo-type dataset"]),
  ("model.checkpoint", "org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["'org/name'", "hf download org/name`"]),
])
def test_what_is_not_there_is_one_line(server, tmp_path, field, name, more, words):
  done = fetch(field, name, tmp_path, server, **more)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(f"config.{field}=") and all(word in line for word in words), line


def test_what_exists_here_goes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert hub.is_id("runs/policy")
  (tmp_path / "runs" / "policy").mkdir(parents=True)
  assert not hub.is_id("runs/policy")
  for path in ("", "policy", "/a/b", "./a/b", "a/b/c", "gs://a/b", "../a"):
    assert not hub.is_id(path)
