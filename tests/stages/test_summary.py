"""The table and the figure of a run, from its metrics file alone."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from axpo_jax.stages import summary


@pytest.fixture
def lines():
  """Two SFT steps, an evaluation, seven RL steps, an evaluation with the last of them."""
  out = [{"step": s, "sft/nll": 3.0 - s} for s in (1, 2)]
  out.append({"step": 2, "eval/pass_at_1": 0.25, "eval/pass_at_4": 0.5,
              "eval/tool_attempt_rate": 0.3, "eval/tool_success_rate": 0.125})
  for s in range(7):
    line = {"step": 3 + s, "rollout/reward_mean": 0.1 * s, "rollout/tool_attempt_rate": 0.3,
            "rollout/tool_all_wrong_rate": 0.8 - 0.1 * s, "rollout/tool_success_rate": 0.05 * s}
    if s % 2:  # nothing triggered in the other steps
      line |= {"axpo/recovered_share": 0.1 * s, "rollout/tool_all_wrong_rate_after": 0.4}
    out.append(line)
  out[-1] |= {"eval/pass_at_1": 0.375, "eval/pass_at_4": 0.625, "eval/tool_attempt_rate": 0.6,
              "eval/tool_success_rate": None}
  return out


def rows(text):
  cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
           if line.startswith("| "))
  return {name: values for name, *values in cells}


def test_table_of_start_and_end(lines):
  table = rows(summary.table(lines))
  assert table["Pass@1"] == ["25.0 %", "37.5 %"]
  assert table["Pass@4"] == ["50.0 %", "62.5 %"]
  assert table["tool-attempt rate"] == ["30.0 %", "60.0 %"]
  # Mean of the first and of the last five training steps.
  assert table["all-wrong rate of the tool subgroup"] == ["60.0 %", "40.0 %"]
  # Steps without a triggered question do not count: 10, 30 and 50 %.
  assert table["recovered share of triggered questions"] == ["30.0 %", "30.0 %"]


def test_an_evaluation_at_the_end_alone_is_no_start(lines):
  table = rows(summary.table([line for line in lines if "sft/nll" not in line][1:]))
  assert table["Pass@1"] == ["–", "37.5 %"]
  # And of a policy that was not trained, there is no end.
  assert rows(summary.table(lines[2:3]))["Pass@1"] == ["25.0 %", "–"]


def test_a_row_a_family(lines):
  assert "search" not in summary.table(lines)
  lines[2] |= {"eval/search/pass_at_1": 0.2, "eval/search/pass_at_4": 0.4,
               "eval/reasoning/pass_at_1": 0.5, "eval/search/tool_attempt_rate": 0.25}
  lines[-1] |= {"eval/search/pass_at_1": 0.3, "eval/reasoning/pass_at_1": 0.75}
  for s in range(7):
    lines[3 + s]["rollout/search/tool_all_wrong_rate"] = 0.9 - 0.1 * s
  table = rows(summary.table(lines))
  assert table["start → end, %"] == ["Pass@1", "Pass@4", "tool attempts", "tool success",
                                     "tool subgroup all wrong"]
  assert table["search"] == ["20.0 → 30.0", "40.0 → –", "25.0 → –", "– → –", "70.0 → 50.0"]
  assert table["reasoning"] == ["50.0 → 75.0", "– → –", "– → –", "– → –", "– → –"]
  assert table["Pass@1"] == ["25.0 %", "37.5 %"]


def test_what_was_not_measured_is_a_dash(lines):
  assert rows(summary.table(lines))["tool-success rate"] == ["12.5 %", "–"]
  empty = rows(summary.table([{"step": 1, "sft/nll": 2.0}]))
  assert set(map(tuple, list(empty.values())[1:])) == {("–", "–")}


def test_series_leaves_out_undefined_steps(lines):
  assert summary.series(lines, "axpo/recovered_share") == ([4, 6, 8], pytest.approx([.1, .3, .5]))
  assert summary.series(lines, "eval/tool_success_rate") == ([2], [0.125])


def test_running_mean():
  assert summary.running_mean([1, 2, 3, 4], window=2) == [1, 1.5, 2.5, 3.5]


@pytest.mark.parametrize("only_sft", [False, True])
def test_plot_is_a_picture(lines, tmp_path, only_sft):
  summary.plot(lines[:2] if only_sft else lines, tmp_path / "curves.png", title="a run")
  with Image.open(tmp_path / "curves.png") as image:
    assert image.size == (1200, 720)
    assert len(image.convert("L").getcolors(256)) > 10


def test_command_makes_them_again(lines, tmp_path):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  done = subprocess.run([sys.executable, "-m", "axpo_jax.stages.summary", str(tmp_path)],
                        capture_output=True, text=True, check=True)
  assert summary.table(lines) in done.stdout
  assert (tmp_path / "curves.png").exists()


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
  with pytest.raises(SystemExit):
    summary.main(["summary", str(tmp_path)])
  assert f"{tmp_path} has no metrics.jsonl" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_table_of_an_evaluation():
  results = {
    "vstar": {"pass_at_1": 0.5, "pass_at_1_se": 0.03, "pass_at_4": 0.75, "pass_at_4_se": 0.04,
              "tool_attempt_rate": 0.8, "questions": 191.0, "rollouts": 764.0, "failed": 2.0},
    "mmsearch": {"pass_at_1": 0.3, "pass_at_1_se": 0.04, "pass_at_4": 0.45, "pass_at_4_se": 0.03,
                 "tool_attempt_rate": 0.9, "questions": 300.0, "rollouts": 1200.0, "failed": 0.0}}
  table = rows(summary.results_table(results))
  assert table["%"] == ["Pass@1", "Pass@4", "tool use", "questions", "failed rollouts"]
  assert table["vstar"] == ["50.0 ± 3.0", "75.0 ± 4.0", "80.0", "191", "2 of 764"]
  # Means of the columns; the error of a mean of two independent ones: hypot(3, 4) / 2.
  assert table["mean"] == ["40.0 ± 2.5", "60.0 ± 2.5", "85.0", "", ""]
  more = {name: result | {"pass_at_8": 0.9} for name, result in results.items()}
  assert rows(summary.results_table(more))["%"][:3] == ["Pass@1", "Pass@4", "Pass@8"]
  del results["vstar"]
  assert "mean" not in rows(summary.results_table(results))
  nothing = {"vstar": {"questions": 3.0, "rollouts": 12.0, "failed": 12.0}}  # nothing was judged
  assert rows(summary.results_table(nothing))["vstar"] == ["–", "3", "12 of 12"]
