"""A benchmark by `module:name`: the example's, read from files as they are published and scored."""

import asyncio
import io
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import axpo_jax
from axpo_jax.config_checks import validate
from axpo_jax.errors import ConfigError
from axpo_jax.eval import benchmarks
from configs.eval_8b import get_config

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
NAME = "own_benchmark:CHARTQA"


@pytest.fixture
def chartqa(tmp_path, monkeypatch):
  """The example on the path, and its files in their folder."""
  monkeypatch.syspath_prepend(str(REPO / "examples"))
  buffer = io.BytesIO()
  Image.new("RGB", (64, 48), "white").save(buffer, "PNG")
  folder = tmp_path / "bench" / "chartqa"
  folder.mkdir(parents=True)
  pq.write_table(pa.table({
    "image": [{"bytes": buffer.getvalue(), "path": None}] * 2, "query": ["How many?", "Which one?"],
    "label": [["40"], ["Peru"]], "human_or_machine": ["human", "machine"]}), folder / "test.parquet")
  return folder


def test_the_example_reads_and_scores(chartqa):
  benchmark = benchmarks.named(NAME)
  number, word = benchmark.read(chartqa)
  assert (number.text, number.answers, number.category, len(number.images)) == ("How many?", ("40",), "human", 1)
  scores = {answer: asyncio.run(benchmark.score(number, answer)).value
            for answer in ("40", "41.9", "38", "42.1", "about 40", None)}
  assert scores == {"40": 1, "41.9": 1, "38": 1, "42.1": 0, "about 40": 0, None: 0}
  assert asyncio.run(benchmark.score(word, "peru")).value == 1


def test_a_config_names_it(chartqa, tmp_path):
  config = get_config()
  config.model.update(preset="tiny", tokenizer=str(REPO / "axpo_jax" / "assets" / "tiny_tokenizer"))
  config.agent.tools, config.rollout.engine, config.mesh.tensor = ("image_zoom_in",), "embedded", 1
  config.eval.update(folder=str(tmp_path / "bench"), benchmarks=(NAME,), max_total_tokens=8192,
                     max_response_tokens=4096)
  validate(config)
  config.eval.folder = str(tmp_path)
  with pytest.raises(ConfigError, match=r"has no folder 'chartqa'"):
    validate(config)
  config.eval.benchmarks = ("own_benchmark:TOLERANCE",)
  with pytest.raises(ConfigError, match=re.escape("'own_benchmark:TOLERANCE' is a float, not an")):
    validate(config)


@pytest.mark.parametrize("name, words", [
  ("nothing", "there is no benchmark 'nothing'; there are ['dynamath'"), ("no_module:X", "cannot be imported"),
  ("own_benchmark:Y", "cannot be imported"), (":X", "cannot be imported")])
def test_what_is_no_benchmark_is_named(chartqa, name, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    benchmarks.named(name)
