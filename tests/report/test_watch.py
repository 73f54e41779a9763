"""The page that follows a run: a real server, and a real browser that sees the next step."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from axpo_jax.report import watch
from axpo_jax.report.page import render
from tests.report.report_run import open_page, write_run
from tests.report.test_report import with_browser


@pytest.fixture
def served(tmp_path):
  folder = tmp_path / "run"
  with watch.server(watch.Watched([str(folder)], lambda runs: render(runs, live=True)), 0) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def get(url, **headers):
  with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
    return answer.read().decode()


def test_a_run_that_is_not_there_yet_is_waited_for(served):
  folder, url = served
  assert "Nothing to show yet" in get(url) and "is not there" in get(url)
  first = get(f"{url}/version")
  write_run(folder, steps=1)
  assert get(f"{url}/version") != first
  assert "Thinking–acting report" in get(url)


def test_a_page_that_cannot_be_made_says_why_and_is_made_again(tmp_path):
  answers = iter([KeyError("x"), "the page"])

  def make(runs):
    answer = next(answers)
    if isinstance(answer, Exception):
      raise answer
    return answer

  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n')
  watched = watch.Watched([str(tmp_path)], make)
  assert b"KeyError" in watched.page() and b"KeyError" in watched.page()
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 1.0}\n')
  assert watched.page() == b"the page"


def test_a_browser_may_leave_the_port_out(served):
  assert "Nothing to show yet" in get(served[1], Host="127.0.0.1")


def test_time_left_is_on_the_page(served):
  folder, url = served
  folder.mkdir()
  (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "rollout/reward_mean": 0.5, "time/left_s": 7500}) + "\n")
  assert "about 2 h 05 min left" in get(url)


@pytest.mark.parametrize("path, host", [("/etc/passwd", "127.0.0.1:1"), ("/", "evil.example:1")])
def test_nothing_else_is_served(served, path, host):
  with pytest.raises(urllib.error.HTTPError) as error:
    get(served[1] + path, Host=host)
  assert error.value.code in (403, 404)


@with_browser
def test_the_browser_shows_the_next_step(served):
  folder, url = served
  write_run(folder, steps=1)
  with open_page(url) as page:
    page.wait_for_selector("#list[data-ready]")
    assert "1 steps" in page.inner_text(".facts")
    page.wait_for_timeout(4000)  # it has asked for the version once
    line = json.loads((folder / "metrics.jsonl").read_text())
    with (folder / "metrics.jsonl").open("a") as file:
      file.write(json.dumps(line | {"step": 2}) + "\n")
    page.wait_for_selector(".facts >> text=2 steps")
    assert page.problems == []
