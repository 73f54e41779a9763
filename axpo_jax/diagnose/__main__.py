"""The command: `python -m axpo_jax.diagnose TRACES [TRACES ...]`; see docs/diagnose.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from axpo_jax.diagnose import output
from axpo_jax.diagnose.figures import diagnose
from axpo_jax.diagnose.reading import FORMATS, read
from axpo_jax.diagnose.traces import FIELDS, Fields, TraceError


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status: 0; 1 with --strict and a warning; 2 if nothing was read, or if rollouts were not counted
  because their calls are in an unknown notation."""
  arguments = _parser().parse_args(argv)
  try:
    names = dict(item.split("=", 1) if "=" in item else (item, "") for item in arguments.field)
    reading = read(arguments.traces, form=arguments.format, fields=Fields(names),
                   tokenizer=arguments.tokenizer, count_unread=arguments.count_unread)
  except TraceError as error:
    print(f"diagnose: {error}", file=sys.stderr)
    return 2
  result = diagnose(reading.traces, arguments.words)
  result["warnings"] = output.unread_warnings(reading) + result["warnings"]
  text = output.markdown(result, reading)
  try:
    _write(arguments.out, result | {
      "formats": reading.formats, "left_out": reading.left_out, **{
        name: [dataclasses.asdict(problem) for problem in getattr(reading, name)]
        for name in ("problems", "unread", "skipped")}}, text)
  except OSError as error:
    print(f"diagnose: --out {arguments.out}: {error.strerror}", file=sys.stderr)
    return 2
  try:
    if sys.stdout.isatty() and not arguments.plain:
      output.show(result, reading)
    else:
      print(text, flush=True)
  except BrokenPipeError:  # the reader, such as `| head`, has ended: drop what is still buffered
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  if not reading.traces or reading.uncounted:
    return 2
  return int(arguments.strict and bool(result["warnings"]))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m axpo_jax.diagnose",
    description="Diagnoses how an agent thinks and acts, from its logs; docs/diagnose.md explains all figures.")
  parser.add_argument("traces", nargs="+", help="logs, or folders of them")
  parser.add_argument("--format", choices=FORMATS, help="format of all records; by default it is detected record by record")
  parser.add_argument("--field", action="append", default=[], metavar="NAME=PATH",
                      help=f"path of a field in a record ({', '.join(FIELDS)}), such as reward=result.score")
  parser.add_argument("--words", nargs="*", default=(), metavar="WORD",
                      help="words in the thinking that count as a mention of a tool")
  parser.add_argument("--tokenizer", help="tokenizer.json for dumps without the text of their tokens")
  parser.add_argument("--count-unread", action="store_true",
                      help="count rollouts with words of calls in an unknown notation, as prose")
  parser.add_argument("--out", default=".", metavar="FOLDER",
                      help="folder for diagnosis.json and diagnosis.md (default: the current one)")
  parser.add_argument("--plain", action="store_true", help="print Markdown on a terminal, too")
  parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a warning")
  return parser


def _write(folder: str, result: dict, text: str) -> None:
  place = pathlib.Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  # Half of a surrogate pair, which UTF-8 cannot encode, becomes a JSON escape.
  for name, content in (("diagnosis.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
                        ("diagnosis.md", text)):
    (place / name).write_text(content, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
  sys.exit(main())
