"""Shows a data set before a run reads it: `python -m axpo_jax.data.inspect PATH`.

In: files or a folder of one's own or of a public data set, or a config that names them. Out: on the
screen what is in there (questions by kind, category, source and whether to act; kinds of gold answers;
sizes of images; the first bad rows with their reasons), and a contact sheet as a picture.

The data are read once, as a stream. The status is 1 if a run with the same limit would stop.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import random
import re
import runpy
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tqdm import tqdm

from axpo_jax.data import adapters, readers
from axpo_jax.data.contact_sheet import contact_sheet
from axpo_jax.data.question import Question, image_size

_OWN = ("jsonl", "parquet", "datasets")
_ROWS = 12  # of a table; what is rarer is summed up
_SMALL = 32  # pixels: images with a shorter side must be enlarged for the policy
_DESCRIPTION = """Shows what is in a data set before a run reads it: how many questions of which kind,
category and source, the form of their gold answers, the sizes of their images, the bad records with
file, row and reason, and a contact sheet of a sample. Exits with 1 if so much is bad that a run would
stop, with 2 if nothing can be read."""
_EXAMPLES = """examples:
  python -m axpo_jax.data.inspect rl.jsonl
  python -m axpo_jax.data.inspect --source virl39k /data/ViRL39K
  python -m axpo_jax.data.inspect --source mmfinereason --column text=problem /data/MMFineReason
  python -m axpo_jax.data.inspect --config configs/axpo_8b.py rl.jsonl"""


@dataclasses.dataclass
class Summary:
  """What was seen of a data set; sizes are counted, so millions of rows take little memory."""

  questions: int = 0
  tables: dict[str, collections.Counter] = dataclasses.field(
      default_factory=lambda: collections.defaultdict(collections.Counter))
  sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  letters: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sample: list[Question] = dataclasses.field(default_factory=list)

  def add(self, question: Question) -> None:
    self.questions += 1
    for name, entry in (
        ("source", question.source), ("category", question.category or "(none)"),
        ("kind", question.kind), ("acting", question.acting),
        ("gold answer", answer_kind(question)), ("options", len(question.options) or "(none)"),
        ("gold answers", len(question.answers)), ("images", len(question.images))):
      self.tables[name][str(entry)] += 1
    self.letters[len(question.text)] += 1
    for source in question.images:
      self.sizes[image_size(source)] += 1


def answer_kind(question: Question) -> str:
  """The form of the first gold answer: letter, number, mathematics or words."""
  answer = question.answers[0].strip()
  if re.fullmatch(r"\(?[A-J]\)?\.?", answer):
    return "letter"
  if re.fullmatch(r"[-+−$]?\d[\d,]*(\.\d+)?\s*%?|[-+−]?\.\d+|[-+−]?\d+/\d+", answer):
    return "number"
  return "mathematics" if re.search(r"[\\^=√π]|\d\s*[-+*/]\s*\d", answer) else "words"


def summarise(questions: Iterable[Question], sample: int = 24, seed: int = 0) -> Summary:
  """Counts a stream of questions and keeps a fair sample of it.

  Args:
    questions: the stream; read once.
    sample: most questions to keep.
    seed: of the sample.
  """
  summary, rng = Summary(), random.Random(seed)
  for question in questions:
    summary.add(question)
    slot = rng.randrange(summary.questions)  # every question is as likely to stay as any other
    if len(summary.sample) < sample:
      summary.sample.append(question)
    elif slot < sample:
      summary.sample[slot] = question
  return summary


def describe(summary: Summary, report: readers.ReadReport) -> str:
  """The summary as text."""
  lines = [f"{summary.questions:,} questions of {report.records:,} records, {report.bad:,} bad"]
  for name, counts in summary.tables.items():
    if len(counts) == 1:
      lines += ["", f"{name}: {next(iter(counts))}"]
    else:
      lines += ["", f"{name}:", *_table(counts, summary.questions)]
  if summary.questions:
    lines += ["", f"letters of a question: {_spread(summary.letters)}"]
  if summary.sizes:
    lines += ["", f"images: {summary.sizes.total():,}"]
    for name, side in (("width", 0), ("height", 1)):
      pixels = collections.Counter()
      for size, count in summary.sizes.items():
        pixels[size[side]] += count
      lines.append(f"  {name}: {_spread(pixels)} pixels")
    small = sum(count for size, count in summary.sizes.items() if min(size) < _SMALL)
    if small:
      lines.append(f"  {small:,} have a side shorter than {_SMALL} pixels")
  if report.bad:
    lines += ["", f"bad records (the first {len(report.examples)} of {report.bad:,}):",
              *(f"  {record}" for record in report.examples)]
  return "\n".join(lines)


def _table(counts: Mapping[str, int], total: int) -> Iterator[str]:
  ordered = collections.Counter(counts).most_common()
  rows = ordered[:_ROWS]
  if rest := ordered[_ROWS:]:
    rows.append((f"({len(rest)} more)", sum(count for _, count in rest)))
  width = max(len(name) for name, _ in rows)
  for name, count in rows:
    yield f"  {name:<{width}}  {count:>9,}  {count / total:6.1%}"


def _spread(counts: collections.Counter) -> str:
  """Least, median and greatest of counted numbers."""
  middle, half = 0, (counts.total() + 1) // 2
  for number in sorted(counts):
    middle += counts[number]
    if middle >= half:
      return f"{min(counts)} least, {number} median, {max(counts)} most"
  raise statistics.StatisticsError("nothing was counted")


# ---- the command ----


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = _parser()
  options = parser.parse_args(argv)
  try:
    source, paths, config = _wanted(options)
    report = readers.ReadReport()
    limit, config = config.max_bad_share, dataclasses.replace(config, max_bad_share=1.0)
    stream = (readers.read_questions(paths, config, report) if source in _OWN
              else adapters.read(source, paths, config, report))
    progress = tqdm(stream, desc="reading", unit=" questions", disable=None)
    summary = summarise(progress, options.sample, options.seed)
  except (readers.ReaderError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(describe(summary, report))
  if options.sheet and summary.sample:
    contact_sheet(summary.sample).save(options.sheet)
    print(f"\ncontact sheet: {options.sheet}")
  if report.bad > limit * report.records:
    print(f"\nA run would stop: {report.bad / report.records:.1%} of the records are bad, and "
          f"max_bad_share is {limit:.1%}.")
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog="python -m axpo_jax.data.inspect", description=_DESCRIPTION, epilog=_EXAMPLES,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("paths", nargs="*", metavar="PATH", help="files, or the folder of a data set")
  add("--source", choices=(*_OWN, *adapters.LAYOUTS), metavar="NAME",
      help=f"whose layout: {', '.join(adapters.LAYOUTS)}; by default one's own files")
  add("--config", metavar="FILE", help="a config file whose section `data` gives what is not given here")
  add("--column", action="append", default=[], metavar="FIELD=COLUMN",
      help="name of a column, as in config.data.columns (text=problem); may be given often")
  add("--image-folder", metavar="FOLDER", help="where image paths start (default: the file's folder)")
  add("--decode", action="store_true", help="decode every image, which finds files that were cut")
  add("--sheet", default="contact_sheet.png", metavar="FILE", help="picture to write; '' for none")
  add("--sample", type=int, default=24, metavar="N", help="questions on it (default %(default)s)")
  add("--seed", type=int, default=0, help="of the sample")
  return parser


def _wanted(options: argparse.Namespace) -> tuple[str, list[str], readers.ReaderConfig]:
  """Source, paths and reader's config: the command line's, and else the config file's.

  Raises:
    ReaderError: they name nothing that can be read.
  """
  config, source, paths = readers.ReaderConfig(), "", []
  if options.config:
    data = _section(options.config)
    source, paths = data.source, [data.path] if data.path else []
    config = readers.ReaderConfig(columns=readers.Columns(**data.columns),
                                  image_folder=data.image_folder, image_anywhere=data.image_anywhere,
                                  max_bad_share=data.max_bad_share)
  source, paths = options.source or source or _OWN[0], options.paths or paths
  if source not in _OWN and source not in adapters.LAYOUTS:
    raise readers.ReaderError(f"data.source={source!r} needs no files: there is nothing to show")
  if not paths:
    raise readers.ReaderError("no PATH is given, and no config that has one in data.path")
  columns = dict(entry.partition("=")[::2] for entry in options.column)
  if unknown := columns.keys() - dataclasses.asdict(config.columns).keys():
    raise readers.ReaderError(f"--column names {sorted(unknown)}; fields are "
                              f"{sorted(dataclasses.asdict(config.columns))}")
  return source, paths, dataclasses.replace(
      config, columns=dataclasses.replace(config.columns, **columns),
      image_folder=options.image_folder or config.image_folder,
      image_check="decode" if options.decode else "header")


def _section(path: str):
  """Section `data` of a config file."""
  if not pathlib.Path(path).is_file():
    raise readers.ReaderError(f"--config {path} is not a file")
  return runpy.run_path(path)["get_config"]().data


if __name__ == "__main__":
  sys.exit(main())
