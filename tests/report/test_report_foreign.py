"""The report on logs that are not ours, and on dumps with damaged lines."""

import base64
import gzip
import io
import json
import re

import PIL.Image
import pytest

from axpo_jax.report.__main__ import main
from tests.diagnose import logs
from tests.report.report_run import find_browser, open_page, write_run

NO_BROWSER = "NOT TESTED HERE: the report in a browser. Install chromium, or set $CHROMIUM to its path"
LONG = "A long prompt. " * 400


def block(path, name):
  found = re.search(f'id="block-{name}">(.*?)</script>', path.read_text())
  return json.loads(gzip.decompress(base64.b64decode(found[1])))


def picture():
  stream = io.BytesIO()
  PIL.Image.new("RGB", (30, 20), "red").save(stream, "PNG")
  return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """Anthropic's blocks and Qwen's text in one folder; some lines are damaged, some not scored."""
  folder = tmp_path_factory.mktemp("logs")
  items = [item for item in logs.episodes(seed=5) if item["step"] == 1]
  records = [logs.as_anthropic(item) for item in items]
  for record in records[:5]:
    record["messages"][0]["content"] = LONG
    record["reward"] = None
  image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": picture()}}
  named = {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}
  records[5]["messages"][0]["content"] = [image, {"type": "text", "text": "With a picture."}, named]
  (folder / "step_1.jsonl").write_text("".join(json.dumps(record) + "\n{broken\n" for record in records))
  logs.write(folder / "qwen.jsonl", [logs.as_qwen(item) for item in items])
  assert main([str(folder)]) == 0
  return folder / "report.html"


def test_foreign_logs_are_drawn(page):
  items = [item for item in logs.episodes(seed=5) if item["step"] == 1]
  index = block(page, "index")
  assert len(index["rows"]) == 2 * len(items)
  assert sum(row[3] for row in index["rows"]) == 2 * sum(len(item["calls"]) for item in items)
  assert sum(row[2] is None for row in index["rows"]) == 5
  groups = block(page, "chunk-0")
  shown = [segment for group in groups for rollout in group["rollouts"]
           for segment in rollout["segments"]]
  calls = [segment["tokens"][0] for segment in shown if segment["kind"] == 2]
  assert any(call.startswith("lookup") for call in calls)
  assert "records not readable: 30" in page.read_text()


@pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)
def test_foreign_logs_in_a_browser(page):
  with open_page(page) as opened:
    opened.wait_for_selector("#detail[data-shown]")
    opened.fill("input[name=text]", "a long prompt")
    opened.focus("#list")
    opened.keyboard.press("Home")
    opened.wait_for_selector("#detail .verdict.unscored")
    detail = opened.locator("#detail")
    folded = detail.locator("details.asked")
    assert folded.locator("div").is_hidden()
    folded.locator("summary").click()
    assert folded.locator("div").inner_text().strip() == LONG.strip()
    # The answer has the width of the page, not that of a cell of the list.
    assert detail.locator(".block.answer").last.bounding_box()["width"] > 400
    opened.fill("input[name=text]", "with a picture")
    opened.focus("#list")
    opened.keyboard.press("Home")
    # The picture that travels in the log is drawn, the file that it names is not.
    opened.wait_for_selector("#detail .head img")
    assert detail.locator("img").evaluate_all("found => found.map(image => [image.naturalWidth])") == [[30]]
    opened.fill("input[name=text]", "a long prompt")
    opened.select_option("select[name=outcome]", "wrong")
    assert opened.inner_text("#count").startswith("0 of")
    assert detail.locator(".modes").count() == 0
    assert opened.problems == []


def test_damaged_lines_cost_one_trajectory_each(tmp_path):
  """Cut, emptied and forged lines, NaN, and a picture that names a file elsewhere on the machine."""
  write_run(tmp_path / "run", steps=1, questions=2)
  (tmp_path / "secret.png").write_bytes(next((tmp_path / "run").rglob("*.png")).read_bytes())
  path = next((tmp_path / "run").rglob("step_*.jsonl"))
  lines = path.read_text().splitlines()
  records = [json.loads(line) for line in lines]
  lines[0] = lines[0][:200]
  lines[1] = json.dumps(records[1] | {"transcript": None})
  away = {"origin": "x", "shown": "../../../../secret", "original": None}
  images = {"images": [away, *records[2]["transcript"]["images"][1:]]}
  lines[2] = json.dumps(records[2] | {"reward": float("nan"),
                                      "transcript": records[2]["transcript"] | images})
  kinds = {"kinds": [[1, 2**62]]}
  lines[3] = json.dumps(records[3] | {"transcript": records[3]["transcript"] | kinds})
  path.write_text("\n".join([*lines, "[]", "null", '{"transcript": 3}', "[" * 100_000]) + "\n")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{broken\n[1]\n{"step": 2, "rollout/reward_mean": NaN, "eval/pass_at_1": []}\n{"step": []}\n'
               f'{{"step": 3, "train/kl": 1{"0" * 400}}}\n')
  assert main([str(tmp_path / "run")]) == 0
  page = tmp_path / "run" / "report.html"
  index = block(page, "index")
  assert len(index["rows"]) == len(lines) - 3
  assert "NaN" not in json.dumps(block(page, "charts"))
  assert "damaged lines left out: 7" in page.read_text()
  groups = [group for i in range(1 + (len(index["groups"]) - 1) // 32)
            for group in block(page, f"chunk-{i}")]
  for group in groups:  # whatever is missing, a continuation stands by its own source
    for rollout in group["rollouts"]:
      if "branch" in rollout:
        assert group["rollouts"][rollout["source"]]["frozen"] == rollout["start"]
  assert groups[0]["rollouts"][0]["reward"] is None
  assert groups[0]["images"][0]["key"] == away["shown"][:16]
  assert f'id="image-{away["shown"][:16]}" data-size="1 1"></script>' in page.read_text()
