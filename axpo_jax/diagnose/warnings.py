"""Warnings: rules on the figures; each gives a sentence with its numbers.

In: overall shares and those over time. Out: [{"kind", "text"}, ...], worst first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from axpo_jax.diagnose.intervals import Share, wilson

# A collapse: the last fifth of the time calls tools at most half as often as the best fifth before.
_FEWEST_TIMES, _PARTS, _HALF = 4, 5, 0.5
_Z_COLLAPSE = 3.29  # 99.9 %: the best of several windows is looked for, so chance gets a margin
_FEWEST_ROLLOUTS = 20
_GAP = 0.25  # all-wrong tool subgroups; the paper finds about 0.4 under GRPO


def warnings(overall: Mapping[str, Share],
             over_time: Sequence[tuple[int | str, Mapping[str, Share]]],
             rollouts: int) -> list[dict[str, str]]:
  """The warnings of the rules that fired. An empty list does not mean that all is well."""
  found = [("collapse", collapse(over_time)), ("no_tools", _no_tools(overall, rollouts)),
           ("thinking_acting_gap", _gap(overall)), ("tools_cost", _tools_cost(overall))]
  return [{"kind": kind, "text": text} for kind, text in found if text]


def collapse(over_time: Sequence[tuple[int | str, Mapping[str, Share]]]) -> str | None:
  """A sentence about when tool use collapsed; None if it did not, or with fewer than four times."""
  times = [when for when, _ in over_time]
  tried = [found["tool_attempt_rate"] for _, found in over_time]
  if len(tried) < _FEWEST_TIMES:
    return None
  size = max(1, len(tried) // _PARTS)
  windows = [_pooled(tried[i:i + size]) for i in range(len(tried) - size + 1)]
  last = windows[-1]
  peak = max(range(len(windows) - size), key=lambda i: windows[i].value)
  if last.value > _HALF * windows[peak].value or last.high >= windows[peak].low:
    return None
  # The first window behind the peak from which on all stay below half of it.
  low = [window.value <= _HALF * windows[peak].value for window in windows]
  since = next(i for i in range(peak + 1, len(windows)) if all(low[i:]))
  return (f"tool use collapsed: tried in {_percent(windows[peak].value)} of the rollouts at "
          f"{_span(times, peak, size)}, in {_percent(last.value)} at "
          f"{_span(times, len(windows) - 1, size)}; at most half as often from {times[since]} on")


def _pooled(parts: Sequence[Share]) -> Share:
  """Several times as one; questions are the observations where rollouts are not."""
  count, of = sum(part.count for part in parts), sum(part.of for part in parts)
  return Share(count / of, *wilson(count, of, _Z_COLLAPSE), count, of, "wilson")


def _no_tools(overall: Mapping[str, Share], rollouts: int) -> str | None:
  tried = overall.get("tool_attempt_rate")
  if tried is None or tried.count or rollouts < _FEWEST_ROLLOUTS:
    return None
  return f"no tool was called in any of {rollouts} rollouts"


def _gap(overall: Mapping[str, Share]) -> str | None:
  wrong = overall.get("tool_all_wrong_rate")
  if wrong is None or wrong.low < _GAP:
    return None
  return (f"in {_percent(wrong.value)} of the {wrong.of:.0f} questions where a tool was tried, every "
          "rollout that tried one is wrong: GRPO gives such calls no positive advantage")


def _tools_cost(overall: Mapping[str, Share]) -> str | None:
  tool, plain = overall.get("tool_success_rate"), overall.get("no_tool_success_rate")
  if tool is None or plain is None or tool.high >= plain.low:
    return None
  return (f"rollouts with a tool are right in {_percent(tool.value)}, those without in "
          f"{_percent(plain.value)}: a reward for right answers alone teaches to avoid tools "
          "(or tools are kept for the hard questions: compare within questions)")


def _span(times: Sequence[int | str], start: int, size: int) -> str:
  first, last = times[start], times[start + size - 1]
  return str(first) if first == last else f"{first}–{last}"


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"
