"""A run for the report's tests and its benchmark: the real episode loop, zoom tool, resampling,
credit and dump, with a scripted sampler instead of a policy. And a browser to look at the page with.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import shutil
from collections.abc import Iterator

import PIL.Image
import PIL.ImageDraw

import axpo_jax
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Sample, SampleRequest, SamplingParams
from axpo_jax.eval import passk
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.rl import algorithm
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.resample import ResampleConfig
from axpo_jax.rollouts import census, collect
from axpo_jax.rollouts.dump import dump_groups
from axpo_jax.rollouts.groups import group_stats, outcome_of
from axpo_jax.stages.metrics import MetricsWriter

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
COLOURS = ("red", "green", "blue", "orange")
RESAMPLE = ResampleConfig(ratio=0.5, k=4)


class Sampler:
  """Thinks, then zooms or answers. Right as often as `skill` says; odd draws of text included."""

  def __init__(self, chat: Chat, tools: float, skill: float, seed: int):
    self._chat, self._tools, self._skill = chat, tools, skill
    self._random = random.Random(seed)

  async def generate(self, request: SampleRequest) -> list[Sample]:
    draw, special = self._random, self._chat
    if request.ids[-1] == special.tool_call_id:  # a frozen prefix
      text = self._call().removeprefix("<tool_call>")
    elif len(request.images) > 1:
      text = f"Now I can read it.\n</think>\n\n{self._answer()}"
    elif draw.random() < self._tools:
      text = f"The mark is small, so I zoom in.\n</think>\n\n{self._call()}"
    else:
      text = f"It says </script> or <b>K</b>, I think.\n</think>\n\n{self._answer()}"
    ids = tuple(self._chat.encode(text))
    return [Sample(ids, tuple(-draw.expovariate(4) for _ in ids), "stop", request.prompt_tokens,
                   request.prompt_tokens // 2, 0)]

  def _call(self) -> str:
    x, y = self._random.randrange(0, 700), self._random.randrange(0, 700)
    arguments = f'{{"bbox_2d": [{x}, {y}, {x + 250}, {y + 250}], "label": "mark"}}'
    if self._random.random() < 0.15:
      arguments = arguments[:-1]
    return f'<tool_call>\n{{"name": "image_zoom_in", "arguments": {arguments}}}\n</tool_call><|im_end|>'

  def _answer(self) -> str:
    letter = "K" if self._random.random() < self._skill else "M"
    return f"<answer>\n\\boxed{{{letter}}}\n</answer><|im_end|>"


def write_run(folder: pathlib.Path, *, steps: int = 3, questions: int = 4, rollouts: int = 6,
              skill: float = 0.35, seed: int = 0) -> None:
  """Writes metrics.jsonl and one dump a step, as a run does."""
  chat = Chat.from_pretrained(TINY)
  draw = random.Random(seed)
  with MetricsWriter(folder, tensorboard=False) as writer:
    for step in range(1, steps + 1):
      sampler = Sampler(chat, 0.8 - 0.5 * step / steps, skill, seed=seed * 1000 + step)
      asked = [_question(draw, f"q{step}-{i}") for i in range(questions)]
      groups = asyncio.run(_groups(_actor(chat, sampler), asked, rollouts, step))
      earned = _credits(groups)
      dump_groups(folder / "rl" / "rollouts" / f"step_{step:06d}.jsonl", groups, earned, chat)
      writer.write(step, _metrics(groups, earned, chat, draw))


async def _groups(actor, asked, rollouts: int, seed: int):
  groups = await collect.sample_groups(actor, asked, rollouts, seed)
  await collect.resample(actor, groups, RESAMPLE, seed)
  return groups


def _credits(groups):
  return algorithm.assign_credit([outcome_of(group) for group in groups], CreditConfig())


def _metrics(groups, earned, chat: Chat, draw: random.Random) -> dict[str, float]:
  stats = group_stats(groups, RESAMPLE, chat)
  rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
  return {**census.census(stats), **census.resample_census(stats, budget=8),
          **census.credit_census(earned), **passk.summarise(rewards, prefix="eval"),
          **passk.summarise(rewards, prefix="eval/perception"),
          "eval/perception/tool_attempt_rate": 0.4,
          "train/logp_gap_abs_mean": 1e-3 * draw.random(), "train/logp_gap_abs_max": 0.1}


def _actor(chat: Chat, sampler: Sampler) -> collect.Actor:
  processor = ImageProcessor.from_checkpoint(TINY)
  zoom = ImageZoomIn(ImageLimits(48 * 48, 48 * 48), factor=processor.factor)
  return collect.Actor(
    sampler, chat, processor, ToolBox([zoom], ["read_image"], describe=False),
    EpisodeLimits(max_turns=3, max_new_tokens_per_turn=200, max_response_tokens=1000,
                  max_total_tokens=2000, max_images=4),
    SamplingParams(max_new_tokens=200), ImageLimits(64 * 64, 96 * 96), "Zoom in on what is small.")


def _question(draw: random.Random, name: str) -> Question:
  colour = draw.choice(COLOURS)
  picture = PIL.Image.new("RGB", (400, 300), (225, 225, 218))
  pen = PIL.ImageDraw.Draw(picture)
  for other in (*COLOURS, colour):
    x, y = draw.randrange(340), draw.randrange(240)
    pen.rectangle((x, y, x + 50, y + 50), fill=other)
    pen.text((x + 22, y + 18), "K", fill="white")
  return Question(name, f"What is written in the {colour} box?", (picture,), ("K",), kind="text",
                  category="perception", acting="act")


def find_browser() -> str | None:
  """Chromium's path: $CHROMIUM, or what the system has."""
  names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
  return next((found for name in names if name and (found := shutil.which(name))), None)


@contextlib.contextmanager
def open_page(path: pathlib.Path | str, **settings) -> Iterator:
  """The file (or the address of a page that is served here) in headless Chromium, without a network;
  `page.problems` collects what its console says and every request that is no part of the page."""
  from playwright.sync_api import sync_playwright

  settings = {"viewport": {"width": 1360, "height": 900}, **settings}
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=find_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"])
    served = isinstance(path, str)
    page = browser.new_context(offline=not served, **settings).new_page()
    page.set_default_timeout(120_000)
    page.problems = []
    page.on("console", lambda message: page.problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url)
            if request.url.startswith("http") and not (served and request.url.startswith(path)) else None)
    page.goto(path if served else path.resolve().as_uri())
    yield page
    browser.close()
