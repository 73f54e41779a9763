"""The diagnosis for people: Markdown, and coloured tables where the terminal can show them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.eval.diagnose.figures import LABELS
from axpo_jax.eval.diagnose.reading import Reading

_SHOWN_PROBLEMS = 10
_SHOWN_TIMES = 20
_OVER_TIME = ("tool_attempt_rate", "tool_success_rate", "no_tool_success_rate",
              "tool_all_wrong_rate", "tool_error_rate")
_HEADS = ("tried a tool", "right with", "right without", "all wrong", "calls failed")


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, head, rows) of every table that has rows."""
  figures = [[label, *_cells(result["figures"].get(name))] for name, label in LABELS.items()
             if name in result["figures"]]
  tools = [[tool, str(found["calls"]), *_cells(found.get("error_rate"))[:2],
            ", ".join(f"{kind} {count}" for kind, count in found["kinds"].items()) or "–"]
           for tool, found in result["tools"].items()]
  times = [[str(row["when"]), str(row["rollouts"]),
            *(_percent(row["figures"].get(name)) for name in _OVER_TIME)]
           for row in thinned(result["over_time"])]
  return [table for table in (
    ("Figures", ["", "share", "95 % interval", "count", "of"], figures),
    ("Errors by tool", ["tool", "calls", "failed", "95 % interval", "kinds"], tools),
    ("Over time", ["", "rollouts", *_HEADS], times)) if table[2]]


def thinned(rows: Sequence[Any]) -> list[Any]:
  """At most `_SHOWN_TIMES` of the rows, evenly, with the first and the last."""
  if len(rows) <= _SHOWN_TIMES:
    return list(rows)
  last = len(rows) - 1
  return [rows[round(i * last / (_SHOWN_TIMES - 1))] for i in range(_SHOWN_TIMES)]


def markdown(result: Mapping[str, Any], reading: Reading) -> str:
  """Everything as Markdown."""
  parts = ["# Thinking and acting", "", summary(result, reading), ""]
  parts += [f"> **Warning ({warning['kind']}):** {warning['text']}\n"
            for warning in result["warnings"]]
  for title, head, rows in tables(result):
    parts += [f"## {title}", "", _rendered(head, rows), ""]
  if reading.problems:
    parts += [f"## Not read: {len(reading.problems)}", "",
              *(f"- {line}" for line in problem_lines(reading)), ""]
  return "\n".join(parts)


def show(result: Mapping[str, Any], reading: Reading) -> None:
  """The same on a terminal, in colour."""
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  console = Console()
  console.print(escape(summary(result, reading)))
  for title, head, rows in tables(result):
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for number, name in enumerate(head):
      table.add_column(escape(name), justify="left" if number == 0 or name == "kinds" else "right")
    for row in rows:
      table.add_row(*map(escape, row))
    console.print(table)
  for line in problem_lines(reading):
    console.print(f"[yellow]not read[/] {escape(line)}", highlight=False)
  for warning in result["warnings"]:
    console.print(f"[bold red]warning[/] {escape(warning['text'])}", highlight=False)


def summary(result: Mapping[str, Any], reading: Reading) -> str:
  """One line: how much was read, and what could not be told."""
  formats = ", ".join(f"{count} {form}" for form, count in sorted(reading.formats.items()))
  text = (f"{result['rollouts']} rollouts of {result['questions']} questions, "
          f"{result['calls']} calls ({formats or 'nothing'} read, "
          f"{reading.left_out} left out, {len(reading.problems)} not readable)")
  unscored = result["rollouts"] - result["scored"]
  return text + (f"; {unscored} have no reward" if unscored else "")


def problem_lines(reading: Reading) -> list[str]:
  """The first problems, and how many more there are."""
  lines = [f"{problem.file}:{problem.line}: {problem.reason}"
           for problem in reading.problems[:_SHOWN_PROBLEMS]]
  rest = collections.Counter(problem.file for problem in reading.problems[_SHOWN_PROBLEMS:])
  return lines + [f"{file}: {count} more" for file, count in rest.items()]


def _cells(share: Mapping[str, Any] | None) -> list[str]:
  if share is None:
    return ["–"] * 4
  return [_percent(share), f"{100 * share['low']:.1f} – {100 * share['high']:.1f}",
          f"{share['count']:.0f}", f"{share['of']:.0f}"]


def _percent(share: Mapping[str, Any] | None) -> str:
  return "–" if share is None else f"{100 * share['value']:.1f} %"


def _rendered(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  cells = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
           for row in cells]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines)
