"""Output of the diagnosis: Markdown, and coloured tables on a terminal."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.diagnose.figures import LABELS
from axpo_jax.diagnose.reading import Problem, Reading
from axpo_jax.markdown import table

_SHOWN_PROBLEMS = 10
_SHOWN_TIMES = 20
_OVER_TIME = ("tool_attempt_rate", "tool_success_rate", "no_tool_success_rate",
              "tool_all_wrong_rate", "tool_error_rate")
_HEADS = ("tried a tool", "right with", "right without", "all wrong", "calls failed")


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, head, rows) of every table that has rows."""
  figures = [[label, *_cells(result["figures"].get(name))] for name, label in LABELS.items()
             if name in result["figures"]]
  tools = [[clean(tool), str(found["calls"]), *_cells(found.get("error_rate"))[:2],
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
  parts += [f"> **Warning ({warning['kind']}):** {clean(warning['text'])}\n"
            for warning in result["warnings"]]
  for title, head, rows in tables(result):
    parts += [f"## {title}", "", table([head, *rows]), ""]
  for title, problems in _lists(reading):
    parts += [f"## {title}: {len(problems)}", "", *(f"- {line}" for line in lines(problems)), ""]
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
  for title, problems in _lists(reading):
    for line in lines(problems):
      console.print(f"[yellow]{title.lower()}[/] {escape(line)}", highlight=False)
  for warning in result["warnings"]:
    console.print(f"[bold red]warning[/] {escape(clean(warning['text']))}", highlight=False)


def summary(result: Mapping[str, Any], reading: Reading) -> str:
  """One line: the numbers of what was read and what was not."""
  formats = ", ".join(f"{count} {form}" for form, count in sorted(reading.formats.items()))
  text = (f"{result['rollouts']} rollouts of {result['questions']} questions, "
          f"{result['calls']} calls ({formats or 'nothing'} read, "
          f"{reading.left_out} left out, {len(reading.problems)} not readable, "
          f"{len(reading.uncounted)} with unknown calls, {len(reading.skipped)} skipped)")
  unscored = result["rollouts"] - result["scored"]
  return text + (f"; {unscored} have no reward" if unscored else "")


def unread_warnings(reading: Reading) -> list[dict[str, str]]:
  """The most important warning: rollouts that may hold calls in an unknown notation."""
  if not reading.unread:
    return []
  words = collections.Counter(problem.reason for problem in reading.unread)
  named = ", ".join(f"{word} ({count})" for word, count in words.most_common(3))
  first, left_out = reading.unread[0], len(reading.uncounted)
  end = (f"{left_out} rollouts are not counted, since they would count as rollouts without calls"
         if left_out else "they are counted as prose, as --count-unread says")
  return [{"kind": "unread_calls", "text": (
    f"{len(reading.unread)} rollouts hold words of calls, and no call could be read: {named}; the "
    f"first at {first.file}:{first.line}. {end}")}]


def lines(problems: Sequence[Problem]) -> list[str]:
  """The first problems, and how many more there are."""
  shown = [clean(f"{problem.file}:{problem.line}: {problem.reason}" if problem.line else
                 f"{problem.file}: {problem.reason}") for problem in problems[:_SHOWN_PROBLEMS]]
  rest = collections.Counter(problem.file for problem in problems[_SHOWN_PROBLEMS:])
  more = [clean(f"{file}: {count} more") for file, count in rest.most_common(_SHOWN_PROBLEMS)]
  left = len(rest) - len(more)
  return shown + more + ([f"and {left} more files, all in diagnosis.json"] if left > 0 else [])


def clean(text: str) -> str:
  """Untrusted text made safe for a terminal: control characters become escapes."""
  return "".join(character if character.isprintable() else
                 character.encode("unicode_escape").decode() for character in text)


def _lists(reading: Reading) -> list[tuple[str, Sequence[Problem]]]:
  return [(title, problems) for title, problems in (
    ("Calls not understood", reading.unread), ("Not read", reading.problems),
    ("Skipped", reading.skipped)) if problems]


def _cells(share: Mapping[str, Any] | None) -> list[str]:
  if share is None:
    return ["–"] * 4
  return [_percent(share), f"{100 * share['low']:.1f} – {100 * share['high']:.1f}",
          f"{share['count']:.0f}", f"{share['of']:.0f}"]


def _percent(share: Mapping[str, Any] | None) -> str:
  return "–" if share is None else f"{100 * share['value']:.1f} %"
