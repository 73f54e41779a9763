"""Shards of rollouts: n judged rollouts of every question of a stream, on disk and restartable.

In: a stream of questions, and an `Actor` (of any engine) that answers them. Out: a folder of shards, and the
records in it. Teacher sampling, the difficulty filter and evaluation all use it. The folder:

  rollouts_00000.jsonl  all rollouts of the first questions, failed ones too, as rollouts.dump writes them
  records_00000.jsonl   a Record a question; written last, so a shard that has it is finished
  images/               what the policy saw, by content
  done.json             totals; written when the stream has ended

The folder may be on an object store. A shard is written whole or not at all. After a kill, finished shards are
skipped and the others are sampled again with the same seeds. A rollout's seed comes from its question's id and
its number, so the size of the shards and the other questions do not matter. `judge_again` scores what a judge
failed to judge.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from axpo_jax import paths, seeds
from axpo_jax.agent.rollout import FAILED_STOPS, Rollout
from axpo_jax.data import files
from axpo_jax.data.filters import Counts
from axpo_jax.data.question import Question
from axpo_jax.errors import RunStopped
from axpo_jax.eval.scoring import JUDGE_FAILED, Score
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageProcessor
from axpo_jax.rollouts import collect, dump
from axpo_jax.rollouts.census import GroupStats, RolloutStats
from axpo_jax.rollouts.groups import rollout_stats

DONE = "done.json"
# Folders of an evaluation: the held-out questions; and below a set of questions, the same with forced calls.
HELD_OUT, FORCED = "held_out", "forced"
# Shards sampled at once: the next one starts while the last episodes of a shard end.
_AHEAD = 2
_AGAIN = 16  # questions judged again at once; each holds its pictures

# Of a question, an answer to it, and all that was said on the way.
Scorer = Callable[[Question, str | None, str], Awaitable[Score]]


class ShardError(ValueError):
  """The shards in the folder are damaged, of other questions, or of another number of rollouts."""


class SamplingError(RunStopped):
  """Every rollout of a shard failed, most likely since the engine is not available."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One question after sampling.

  Attributes:
    id: of the question.
    place: number of the question in its stream, from 0.
    asked: rollouts that were asked for.
    stats: of every rollout, failed ones too, in the order of the shard's rollouts; none if the
      question could not be asked.
    answers: the answer of each.
    scores: the benchmark's score of each; empty without a benchmark.
    family: `Question.category`.
    acting: `Question.acting`.
    group: what variants of one question share; by default its id.
    error: why a rollout failed, or why the question could not be asked; "" if nothing failed.
  """

  id: str
  place: int
  asked: int
  stats: tuple[RolloutStats, ...]
  answers: tuple[str | None, ...]
  scores: tuple[Score, ...] = ()
  family: str = ""
  acting: str = "either"
  group: str = ""
  error: str = ""

  @property
  def judged(self) -> list[int]:
    """Numbers of the rollouts that did not fail."""
    return [i for i, stats in enumerate(self.stats) if stats.stop not in FAILED_STOPS]

  @property
  def failed(self) -> int:
    return self.asked - len(self.judged)

  @property
  def unjudged(self) -> list[int]:
    """Numbers of the rollouts whose judge failed."""
    return [i for i, score in enumerate(self.scores) if score.how == JUDGE_FAILED]

  @property
  def counts(self) -> Counts:
    return Counts(tuple(self.stats[i].reward for i in self.judged))

  def group_stats(self) -> GroupStats:
    """As the census reads it."""
    return GroupStats([self.stats[i] for i in self.judged], family=self.family, acting=self.acting)

  def to_json(self) -> dict[str, Any]:
    counts = self.counts
    return {"id": self.id, "passed": counts.passed, "judged": len(counts.rewards),
            "failed": self.failed} | dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> Record:
    fields = {field.name: record[field.name] for field in dataclasses.fields(cls)}
    return cls(**fields | {
      "stats": tuple(RolloutStats(**stats) for stats in record["stats"]),
      "answers": tuple(record["answers"]),
      "scores": tuple(Score(**score) for score in record["scores"])})


def done(folder: epath.Path) -> bool:
  """Whether the whole stream was sampled."""
  return (folder / DONE).exists()


def records(folder: str | os.PathLike) -> Iterator[Record]:
  """The records of all finished shards, in the order of the stream.

  Raises:
    ShardError: there is none, or one is damaged.
  """
  files = paths.glob(epath.Path(folder), "records_*.jsonl")
  if not files:
    raise ShardError(f"{folder} holds no sampled shards (records_*.jsonl)")
  return itertools.chain.from_iterable(map(_read, files))


def _read(path: epath.Path) -> list[Record]:
  try:
    return [Record.from_json(json.loads(line)) for line in path.read_text().splitlines()]
  except (ValueError, KeyError, TypeError) as error:
    raise ShardError(f"{path} is damaged ({error!r}): delete it, and it is sampled again") from error


class Trajectories:
  """Selected rollouts of a folder of shards, or all of one dump. Each is read on access.

  Args:
    path: the folder, or the .jsonl file.
    processor: makes the images' patches.
    choose: the numbers of the wanted rollouts of a record; None: all. A dump has no records.
  """

  def __init__(self, path: str | os.PathLike, processor: ImageProcessor,
               choose: Callable[[Record], Iterable[int]] | None = None):
    self._processor = processor
    self._places: list[tuple[epath.Path, int]] = []  # file, byte
    path = epath.Path(path)
    if path.is_file():
      self._places = [(path, start) for start in files.line_starts(path)]
      return
    for file in paths.glob(path, "records_*.jsonl"):
      rollouts, numbers = _rollouts_of(file), itertools.count()
      starts = files.line_starts(rollouts)
      for record in _read(file):
        own = [next(numbers) for _ in record.stats]
        wanted = range(len(own)) if choose is None else choose(record)
        self._places += [(rollouts, starts[own[i]]) for i in wanted]

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> Rollout:
    path, start = self._places[index]
    return dump.rollout_from_line(files.line_at(path, start), dump.ImageStore(path.parent / "images"),
                                  self._processor, f"{path}, byte {start}")


def _rollouts_of(records_file: epath.Path) -> epath.Path:
  return records_file.with_name(records_file.name.replace("records_", "rollouts_"))


async def sample(folder: epath.Path, questions: Iterable[Question],
                 actor: Callable[[Question], collect.Actor], n: int, seed: int, *, size: int = 64,
                 score: Scorer | None = None, group: Callable[[Question], str] = lambda q: q.id,
                 progress: str = "") -> list[Record]:
  """Samples the unfinished shards; returns the records of all questions.

  Args:
    folder: of the shards; made if it is not there.
    questions: the stream, the same at every call.
    actor: the actor that answers a question.
    n: rollouts a question.
    seed: of the sampling.
    size: questions of a shard: what a kill can cost.
    score: judges the answers; None leaves the reward that the episode gave.
    group: what variants of one question share.
    progress: label of a progress bar; empty for none.

  Raises:
    ShardError: finished shards are of other questions, or of another n.
    SamplingError: all rollouts of a shard failed. Finished shards stay.
  """
  paths.make(folder)
  paths.remove_leftovers(folder)  # of a killed run, half an image too
  found: dict[int, list[Record]] = {}
  failures: list[SamplingError] = []
  room = asyncio.Semaphore(_AHEAD)

  async def one(number: int, asked: list[tuple[int, Question]]):
    try:
      found[number] = await run.shard(number, asked)
    except SamplingError as error:  # shards that are under way may still be finished
      failures.append(error)
    finally:
      room.release()

  with tqdm(desc=progress, unit="question", disable=not progress) as bar:
    run = _Run(folder, actor, n, seed, score, group, bar)
    try:
      async with asyncio.TaskGroup() as tasks:
        for number, asked in enumerate(_shards(questions, size)):
          await room.acquire()
          if failures:
            break
          tasks.create_task(one(number, asked))
    except ExceptionGroup as errors:  # raise the error of the first shard that failed
      raise errors.exceptions[0] from None
  if failures:
    raise failures[0]
  everything = [record for number in sorted(found) for record in found[number]]
  paths.write_text(folder / DONE, json.dumps(totals(everything), indent=2))
  return everything


async def judge_again(folder: epath.Path, questions: Callable[[], Iterable[Question]],
                      score: Scorer, chat: Chat, processor: ImageProcessor) -> int:
  """Scores anew, in finished shards, what a judge failed to judge; returns how much of it still waits.

  Args:
    folder: of the shards, or one that is not there yet.
    questions: makes the stream that they were sampled from; not called if nothing waits.
    score: see `sample`.
    chat, processor: of the policy that was sampled, to write its rollouts again.
  """
  files = {path: _read(path) for path in paths.glob(folder, "records_*.jsonl")}
  waiting = {record.id: (path, i) for path, kept in files.items() for i, record in enumerate(kept)
             if record.unjudged}
  if not waiting:
    return 0
  changed = {path for path, _ in waiting.values()}
  said = {path: dump.responses(_rollouts_of(path), chat) for path in changed}
  room = asyncio.Semaphore(_AGAIN)

  async def one(question: Question, path: epath.Path, i: int) -> None:
    first = sum(len(record.stats) for record in files[path][:i])
    files[path][i] = await _judged(files[path][i], question, score, said[path][first:])
    room.release()

  async with asyncio.TaskGroup() as tasks:
    for question in questions():
      if question.id in waiting:
        await room.acquire()
        tasks.create_task(one(question, *waiting[question.id]))
  for path in sorted(changed):
    _rewrite(path, files[path], chat, processor)
  everything = [record for kept in files.values() for record in kept]
  if done(folder):
    paths.write_text(folder / DONE, json.dumps(totals(everything), indent=2))
  return sum(len(record.unjudged) for record in everything)


async def _judged(record: Record, question: Question, score: Scorer, responses: list[str]) -> Record:
  """The record with new scores where it had none."""
  scores, stats = list(record.scores), list(record.stats)
  for i in record.unjudged:
    scores[i] = await score(question, record.answers[i], responses[i])
    stats[i] = dataclasses.replace(stats[i], reward=scores[i].value)
  return dataclasses.replace(record, scores=tuple(scores), stats=tuple(stats))


def _rewrite(path: epath.Path, kept: list[Record], chat: Chat, processor: ImageProcessor) -> None:
  """A shard with the rewards of its records, which again are written last."""
  file = _rollouts_of(path)
  notes = [json.loads(line)["extra"] for line in file.read_text(encoding="utf-8").splitlines()]
  rollouts = list(dump.load_rollouts(file, processor))
  for rollout, stats in zip(rollouts, (s for record in kept for s in record.stats), strict=True):
    rollout.reward = stats.reward
  dump.dump_rollouts(file, rollouts, extra=notes, chat=chat, originals=False)
  _write_records(path, kept)


def totals(of: Iterable[Record]) -> dict[str, int]:
  """Counts over questions: rollouts asked for, judged, failed, right, with tools; and questions by
  how many of their rollouts are right."""
  of = list(of)
  judged = [record.stats[i] for record in of for i in record.judged]
  return {"questions": len(of), "rollouts": sum(record.asked for record in of),
          "judged": len(judged), "failed": sum(record.failed for record in of),
          "right": sum(stats.right for stats in judged),
          "used_tool": sum(stats.used_tool for stats in judged),
          "never_right": sum(record.counts.passed == 0 for record in of),
          "always_right": sum(record.counts.pass_rate == 1 for record in of)}


def _shards(questions: Iterable[Question], size: int) -> Iterator[list[tuple[int, Question]]]:
  stream = iter(enumerate(questions))
  while shard := list(itertools.islice(stream, size)):
    yield shard


@dataclasses.dataclass
class _Run:
  """One call of `sample`."""

  folder: epath.Path
  actor: Callable[[Question], collect.Actor]
  n: int
  seed: int
  score: Scorer | None
  group: Callable[[Question], str]
  bar: tqdm

  async def shard(self, number: int, asked: list[tuple[int, Question]]) -> list[Record]:
    path = self.folder / f"records_{number:05d}.jsonl"
    if path.exists():
      kept = _read(path)
      self._check(path, kept, asked)
      self.bar.update(len(kept))
      return kept
    answered = await asyncio.gather(*(self._question(place, question) for place, question in asked))
    rollouts = [rollout for _, own in answered for rollout in own]
    if rollouts and all(rollout.failed for rollout in rollouts):
      raise SamplingError(
        f"all {len(rollouts)} rollouts of shard {number} failed, the first with: "
        f"{rollouts[0].error or rollouts[0].stop}. Finished shards are kept: repair the cause and run the "
        "same command again")
    notes = [{"group": place, "category": question.category, "acting": question.acting,
              "gold": list(question.answers), "rollout": i, "question": question.text}
             for (place, question), (_, own) in zip(asked, answered) for i in range(len(own))]
    await asyncio.to_thread(dump.dump_rollouts, _rollouts_of(path), rollouts, extra=notes,
                            chat=self.actor(asked[0][1]).chat, originals=False)
    new = [record for record, _ in answered]
    _write_records(path, new)
    return new

  def _check(self, path: epath.Path, kept: list[Record],
             asked: list[tuple[int, Question]]) -> None:
    if [record.id for record in kept] != [question.id for _, question in asked]:
      raise ShardError(f"{path} is of other questions than those asked for now, or of another shard "
                       "size: choose another folder, or delete this one")
    if other := {record.asked for record in kept} - {self.n}:
      raise ShardError(f"{path} has {other.pop()} rollouts a question, not {self.n}: choose another "
                       "folder, or delete this one")

  async def _question(self, place: int, question: Question) -> tuple[Record, list[Rollout]]:
    actor = self.actor(question)
    start = collect.prompt(actor, question)
    rollouts = [] if start is None else await asyncio.gather(*(
      actor.roll(start, question, seeds.derive(self.seed, question.id, i)) for i in range(self.n)))
    scores = () if self.score is None else await asyncio.gather(*(
      self.score(question, rollout.answer, actor.chat.decode(
        rollout.transcript.ids[rollout.transcript.prompt_length:])) for rollout in rollouts))
    for rollout, score in zip(rollouts, scores):
      rollout.reward = score.value
    error = "the question cannot be asked" if start is None else next(
      (rollout.error or rollout.stop for rollout in rollouts if rollout.failed), "")
    record = Record(
      question.id, place, self.n,
      tuple(rollout_stats(rollout, actor.chat) for rollout in rollouts),
      tuple(rollout.answer for rollout in rollouts), tuple(scores), question.category,
      question.acting, self.group(question), error)
    self.bar.update()
    return record, list(rollouts)


def _write_records(path: epath.Path, kept: Iterable[Record]) -> None:
  paths.write_text(path, "".join(json.dumps(record.to_json()) + "\n" for record in kept))

