"""Search: the Tavily client against a real server that speaks its format, the local index, the
record, and how results are shown."""

import asyncio
import http.server
import json
import threading
import time

import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.corpus import CorpusError, Document, LocalSearch, read_documents
from axpo_jax.agent.tools.search import Hit, NoBackend, Record, SearchTool
from axpo_jax.agent.tools.tavily import MissingKey, Tavily, _Busy
from axpo_jax.agent.tools.text import middle_cutter

# As https://docs.tavily.com shows it.
PAGE = {"title": "Kites", "url": "https://birds.example/kite", "content": "A kite is a bird.",
        "score": 0.98, "raw_content": None}
LEAK = {"title": "Answers", "url": "https://huggingface.co/datasets/x", "content": "gold"}
GOOD = (200, {}, {"query": "kite", "results": [PAGE], "response_time": 0.4, "request_id": "1"})


class Server:
  """Answers with the scripted (status, headers, body) in turn, the last one for ever."""

  def __init__(self, *answers):
    self.answers, self.requests = list(answers), []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        outer.requests.append((self.path, dict(self.headers), body))
        answers = outer.answers
        status, headers, content = answers.pop(0) if len(answers) > 1 else answers[0]
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, *args): ...

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.http.server_port}/search"
    threading.Thread(target=self.http.serve_forever, daemon=True).start()

  def close(self):
    self.http.shutdown()
    self.http.server_close()


@pytest.fixture
def serve():
  servers = []

  def start(*answers):
    servers.append(Server(*answers))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def tavily(server, **changes):
  settings = {"per_minute": 60_000, "first_wait": 0.01} | changes
  return Tavily("tvly-secret", url=server.url, **settings)


def ask(tool, query="kite", **arguments):
  box = ToolBox([tool], ["network"])
  return asyncio.run(box.call("tavily-search", {"query": query, **arguments},
                              EpisodeState("q", [])))


# ---- Tavily ----

def test_a_search_over_http(serve):
  server = serve(GOOD)
  seen = ask(SearchTool(tavily(server)), " kite ", max_results=3)
  assert seen.error is None
  assert seen.text == "[1] Kites\nhttps://birds.example/kite\nA kite is a bird."
  ((path, headers, body),) = server.requests
  assert path == "/search" and headers["Authorization"] == "Bearer tvly-secret"
  assert body["query"] == "kite" and body["max_results"] == 3
  assert body["exclude_domains"] == ["huggingface.co"]


def test_busy_servers_are_asked_again(serve):
  server = serve((429, {"Retry-After": "0"}, {}), (503, {}, b"down"), GOOD)
  assert "Kites" in ask(SearchTool(tavily(server))).text
  assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait():
  class Outcome:
    def exception(self):
      return _Busy(429, "7")

  class State:
    outcome, attempt_number = Outcome(), 1

  assert 7 <= Tavily("k")._wait(State()) <= 8


def test_in_the_end_it_is_given_up_and_said(serve):
  server = serve((503, {}, {}))
  seen = ask(SearchTool(tavily(server, attempts=2)))
  assert seen.error == "search_error" and "status 503" in seen.text and len(server.requests) == 2


@pytest.mark.parametrize("answer, says", [
    ((401, {}, {"detail": {"error": "Unauthorized: missing or invalid API key."}}), "invalid API key"),
    ((432, {}, {"detail": {"error": "This request exceeds your plan's set usage limit"}}), "plan"),
    ((400, {}, [1]), "status 400"),
    ((200, {}, b"<html>"), "not JSON"),
    ((200, {}, {"answer": "x"}), "no list of results"),
    ((200, {}, {"results": [3]}), "no list of results"),
])
def test_refusals_and_nonsense_are_not_retried_and_do_not_show_the_key(serve, answer, says):
  server = serve(answer)
  seen = ask(SearchTool(tavily(server)))
  assert seen.error == "search_error" and says in seen.text and "tvly-secret" not in seen.text
  assert len(server.requests) == 1


def test_a_server_that_is_not_there(serve):
  server = serve(GOOD)
  server.close()
  seen = ask(SearchTool(tavily(server, attempts=2)))
  assert seen.error == "search_error" and "ConnectError" in seen.text


def test_the_rate_is_kept(serve):
  """600 a minute: ten at once, and ten a second from then on."""
  server = serve(GOOD)
  tool = SearchTool(tavily(server, per_minute=600))
  box = ToolBox([tool], ["network"])

  async def main():
    await asyncio.gather(*(box.call("search", {"query": f"q{i}"}, EpisodeState("q", []))
                           for i in range(15)))

  begin = time.monotonic()
  asyncio.run(main())
  assert time.monotonic() - begin >= 0.45 and len(server.requests) == 15


def test_without_a_key(monkeypatch):
  monkeypatch.delenv("TAVILY_API_KEY", raising=False)
  with pytest.raises(MissingKey, match="TAVILY_API_KEY"):
    Tavily()
  monkeypatch.setenv("TAVILY_API_KEY", "k")
  assert Tavily().waits


# ---- the record ----

def test_a_rerun_costs_nothing_and_sees_the_same(serve, tmp_path):
  server = serve(GOOD)
  first = ask(SearchTool(tavily(server), tmp_path))
  assert ask(SearchTool(tavily(server), tmp_path)) == first
  assert ask(SearchTool(NoBackend(), tmp_path)) == first
  assert len(server.requests) == 1
  other = ask(SearchTool(NoBackend(), tmp_path), "another")
  assert other.error == "search_error" and "no recorded result for 'another'" in other.text
  assert ask(SearchTool(NoBackend(), tmp_path), max_results=4).error == "search_error"


def test_errors_are_not_recorded(serve, tmp_path):
  server = serve((400, {}, {}), GOOD)
  tool = SearchTool(tavily(server), tmp_path)
  assert ask(tool).error == "search_error"
  assert ask(tool).error is None


def test_a_damaged_record_is_asked_again(serve, tmp_path):
  server = serve(GOOD)
  ask(SearchTool(tavily(server), tmp_path))
  (file,) = tmp_path.rglob("*.json")
  file.write_text('{"hits": [{"tit')
  assert "Kites" in ask(SearchTool(tavily(server), tmp_path)).text
  assert Record(tmp_path).get("kite", 5) == [Hit("Kites", PAGE["url"], PAGE["content"])]


def test_rollouts_that_ask_the_same_at_once_share_one_request():
  class Held(Fixed):
    waits, asked = True, 0

    async def search(self, query, max_results):
      self.asked += 1
      await asyncio.sleep(0)
      return self.hits

  async def main():
    state = EpisodeState("q", [])
    return await asyncio.gather(*(tool.run({"query": "kite", "max_results": 5}, state)
                                  for _ in range(8)))

  tool = SearchTool(Held(Hit("t", "u", "c")))
  assert len({seen.text for seen in asyncio.run(main())}) == 1 and tool._backend.asked == 1
  asyncio.run(main())  # but a later one asks anew, unless there is a record
  assert tool._backend.asked == 2


# ---- what is shown ----

class Fixed:
  waits = False

  def __init__(self, *hits):
    self.hits = hits

  async def search(self, query, max_results):
    return self.hits[:max_results]


def test_excluded_domains_are_left_out_whoever_found_them():
  hits = [Hit("a", url, "c") for url in
          ("https://huggingface.co/x", "http://sub.HuggingFace.co:80/x", "https://nothuggingface.co/",
           "https://ok.example/huggingface.co", "http://[broken", "")]
  text = ask(SearchTool(Fixed(*hits)), max_results=20).text
  assert text.count("\nc") == 4
  assert "https://huggingface.co/x" not in text and "HuggingFace" not in text


@pytest.mark.parametrize("asked, given", [(10**9, 20), (-1, 1), (0, 1), (2, 2)])
def test_the_number_of_results_is_bounded(asked, given):
  tool = SearchTool(Fixed(*[Hit(f"t{i}", "", "c") for i in range(30)]))
  assert ask(tool, max_results=asked).text.count("[") == given


def test_nothing_found_and_nothing_asked():
  assert ask(SearchTool(Fixed())).text == "No results for 'kite'."
  assert ask(SearchTool(Fixed()), "  ").error == "search_error"


def test_long_results_are_cut_in_the_middle_at_a_number_of_tokens(chat):
  cut = middle_cutter(20, chat.encode_plain, chat.decode)
  text = " ".join(f"word{i}" for i in range(200))
  box = ToolBox([SearchTool(Fixed(Hit("t", "u", text)))], ["network"], cut=cut)
  seen = asyncio.run(box.call("search", {"query": "x"}, EpisodeState("q", []))).text
  whole = f"[1] t\nu\n{text}"
  first, note, last = seen.split("\n[... ")[0], seen, seen.split(" tokens cut ...]\n")[1]
  assert whole.startswith(first) and whole.endswith(last)
  cut_out = int(note.split("[... ")[1].split()[0])
  assert cut_out == len(chat.encode_plain(whole)) - 20
  assert len(chat.encode_plain(first)) <= 11 and len(chat.encode_plain(last)) <= 11
  assert cut("short") == "short"


def test_special_tokens_in_a_page_survive_the_cut_as_text(chat):
  text = "<|im_end|>" + "x y " * 100 + "</tool_response>"
  cut = middle_cutter(40, chat.encode_plain, chat.decode)(text)
  assert cut.startswith("<|im_end|>") and cut.endswith("</tool_response>")


# ---- the local index ----

DOCUMENTS = [Document("Orla", "Orla was born in the town of Brindle.", "people/orla"),
             Document("Brindle", "The mayor of Brindle is Ottoline Marsh.", "towns/brindle"),
             Document("Long", "filler " * 500 + "The heron nests in Brindle. " + "filler " * 300,
                      "long")]


def test_two_hops_over_a_local_index():
  tool = SearchTool(LocalSearch(DOCUMENTS))
  assert ask(tool, "where was Orla born?").text.startswith("[1] Orla\npeople/orla\nOrla was born")
  assert ask(tool, "mayor of Brindle").text.startswith("[1] Brindle\n")
  assert ask(tool, "mayor of Brindle", max_results=1).text.count("[") == 1
  assert ask(tool, "xylophone").text == "No results for 'xylophone'."
  assert ask(tool, "of the ?!").text.startswith("No results")


def test_long_documents_come_as_the_passage_that_fits_and_once():
  text = ask(SearchTool(LocalSearch(DOCUMENTS)), "heron nests filler").text
  assert text.count("] Long") == 1 and "heron" in text and len(text) < 2500


def test_documents_of_a_folder_and_of_a_file(tmp_path):
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "one.md").write_text("first text")
  (tmp_path / "two.txt").write_text("second text")
  (tmp_path / "not.png").write_bytes(b"\x89PNG")
  assert [(d.title, d.url) for d in read_documents(tmp_path)] == [
      ("one", "deep/one.md"), ("two", "two.txt")]
  file = tmp_path / "corpus.jsonl"
  file.write_text('{"text": "a", "title": "T", "url": "u"}\n{"text": "b"}\n')
  assert read_documents(file) == [Document("T", "a", "u"), Document("", "b", "")]


@pytest.mark.parametrize("content, says", [
    ('{"text": "a"}\n{"title": "no text"}\n', "line 2: KeyError 'text'"), ("[1]\n", "line 1"),
    ("{", "line 1"), ("", "holds no documents"),
])
def test_bad_corpora_are_named(tmp_path, content, says):
  file = tmp_path / "corpus.jsonl"
  file.write_text(content)
  with pytest.raises(CorpusError, match=says):
    read_documents(file)
  with pytest.raises(CorpusError, match="neither a folder nor"):
    read_documents(tmp_path / "nowhere")
