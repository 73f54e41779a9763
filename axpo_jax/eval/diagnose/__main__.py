"""The command: `python -m axpo_jax.eval.diagnose TRACES [TRACES ...]`; see docs/diagnose.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from axpo_jax.eval.diagnose import output
from axpo_jax.eval.diagnose.figures import diagnose
from axpo_jax.eval.diagnose.reading import FORMATS, read
from axpo_jax.eval.diagnose.traces import FIELDS, Fields, TraceError


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit status: 0, 1 with --strict where something warns, 2 if nothing was read."""
  arguments = _parser().parse_args(argv)
  try:
    names = dict(item.split("=", 1) if "=" in item else (item, "") for item in arguments.field)
    reading = read(arguments.traces, form=arguments.format, fields=Fields(names),
                   tokenizer=arguments.tokenizer)
  except TraceError as error:
    print(f"diagnose: {error}", file=sys.stderr)
    return 2
  result = diagnose(reading.traces, arguments.words)
  text = output.markdown(result, reading)
  _write(arguments.out, result | {
    "formats": reading.formats, "left_out": reading.left_out,
    "problems": [dataclasses.asdict(problem) for problem in reading.problems]}, text)
  if sys.stdout.isatty() and not arguments.plain:
    output.show(result, reading)
  else:
    print(text)
  if not reading.traces:
    return 2
  return int(arguments.strict and bool(result["warnings"]))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m axpo_jax.eval.diagnose",
    description="How an agent thinks and acts, from its logs; docs/diagnose.md explains all figures.")
  parser.add_argument("traces", nargs="+", help=".jsonl, .json, .txt or .log files, or folders")
  parser.add_argument("--format", choices=FORMATS, help="instead of detecting it file by file")
  parser.add_argument("--field", action="append", default=[], metavar="NAME=PATH",
                      help=f"where a record keeps {', '.join(FIELDS)}: reward=result.score")
  parser.add_argument("--words", nargs="*", default=(), metavar="WORD",
                      help="words by which thinking mentions a tool")
  parser.add_argument("--tokenizer", help="tokenizer.json for dumps without the text of their tokens")
  parser.add_argument("--out", default=".", metavar="FOLDER",
                      help="where diagnosis.json and diagnosis.md go (default: here)")
  parser.add_argument("--plain", action="store_true", help="Markdown on a terminal too")
  parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a warning")
  return parser


def _write(folder: str, result: dict, text: str) -> None:
  place = pathlib.Path(folder)
  place.mkdir(parents=True, exist_ok=True)
  (place / "diagnosis.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n",
                                        encoding="utf-8")
  (place / "diagnosis.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
  sys.exit(main())
