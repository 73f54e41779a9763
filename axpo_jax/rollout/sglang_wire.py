"""SGLang's `/generate`: from our requests to its JSON, and from its JSON to our samples.

In: a SampleRequest and its encoded images. Out: payloads; and, from the replies, Samples whose
numbers obey the engine's contract. Pure functions: nothing here talks to a server.

Every reply is checked against what was asked. A server that counts another prompt than we do has
tokenised the ids again or expanded an image twice, and everything behind that point would be
trained on wrong positions: `ContractError` names both counts.

Log-probabilities. The server reports them after the logit bias, the penalties and the temperature,
and before top-k and top-p. That is our contract (see SamplingParams) except in two cases, which
cost a second request that scores the sampled ids in one prefill over the cached prompt:

- `untempered_logprobs` at another temperature than 1: the score gives log p at temperature 1 of the
  ids and of the banned ids; the latter's mass is taken out of the normaliser.
- A presence penalty: the score also gives log p of every id drawn so far, and with these the
  penalised normaliser is turned into the plain one. Its size is (length x distinct ids), so leave the
  penalty at 0 where long samples are trained on.

Legend: L new tokens, l log-probability at temperature 1 over the whole vocabulary, T temperature.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.rollout.engine import RequestError, Sample, SampleRequest, SamplingParams
from axpo_jax.rollout.sglang_api import ServerError

# Added to a banned id's logit: its probability is then an exact zero in any float type.
BAN_BIAS = -1e9
_MAX_SEED = 2**63 - 1


class ContractError(ServerError):
  """A reply that breaks the engine's contract: counts, ids or log-probabilities that do not fit."""


class VersionMismatch(ContractError):
  """A reply that was drawn, wholly or in part, from other weights than the server should hold."""


class Aborted(ServerError):
  """The server cut the request short (an update of the weights, a shutdown)."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """One checked reply.

  ids, logprobs: as the server gave them, the stop id included.
  stopped: whether a stop id ended it (else its length did).
  cached_tokens: expanded prompt tokens that the server took from its cache.
  """

  ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  stopped: bool
  cached_tokens: int


def check_ids(request: SampleRequest, vocab_size: int) -> None:
  """Raises RequestError for ids outside the vocabulary: one such id can end the server's process."""
  p = request.params
  for name, ids in (("ids", request.ids), ("stop_ids", p.stop_ids), ("banned_ids", p.banned_ids)):
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
      raise RequestError(f"{name} holds {wrong[:5]}, outside the vocabulary of {vocab_size}")


def payload(request: SampleRequest, seed: int, images: Sequence[str], length: int) -> dict[str, Any]:
  """The JSON that asks for one sample.

  Args:
    images: of the request, encoded: data URLs, or paths that the server can open.
    length: expanded tokens that a sequence may have; the sample ends there.
  """
  p = request.params
  params: dict[str, Any] = {
    "max_new_tokens": min(p.max_new_tokens, length - request.prompt_tokens),
    "temperature": p.temperature,
    "top_p": p.top_p,
    "top_k": p.top_k or -1,
    "presence_penalty": p.presence_penalty,
    # Ignored by servers without deterministic inference.
    "sampling_seed": seed & _MAX_SEED,
    "skip_special_tokens": False,
  }
  if p.banned_ids:
    params["logit_bias"] = {str(i): BAN_BIAS for i in p.banned_ids}
  if p.stop_ids:
    params["stop_token_ids"] = list(p.stop_ids)
  else:
    params["ignore_eos"] = True  # nothing but the length may end it
  # Output log-probabilities only: those of the prompt would switch the prefix cache off.
  return _prompt(request.ids, images) | {"sampling_params": params, "return_logprob": True}


def prefill_payload(request: SampleRequest, images: Sequence[str]) -> dict[str, Any]:
  """The JSON that leaves the prompt in the server's cache and samples nothing."""
  return _prompt(request.ids, images) | {
    "sampling_params": {"max_new_tokens": 0, "temperature": 0, "ignore_eos": True}
  }


def _prompt(ids: Sequence[int], images: Sequence[str]) -> dict[str, Any]:
  # Pads without image_data, or an empty list, are taken as text without a word: send both or none.
  return {"input_ids": list(ids), **({"image_data": list(images)} if images else {})}


def read(reply: Mapping[str, Any], request: SampleRequest, tag: str) -> Reply:
  """The reply to `payload`, checked.

  Args:
    tag: version tag that the server's weights must have.

  Raises:
    Aborted: the server gave up on the request.
    ContractError: counts, ids or log-probabilities do not fit the request, or the JSON is not
      SGLang's. VersionMismatch: wrong weights.
  """
  try:
    meta = reply["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
      raise Aborted(f"the server aborted the request: {finish.get('message')}")
    _check_prompt(meta, request)
    check_version(meta, tag)
    ids = tuple(int(i) for i in reply["output_ids"])
    triples = meta["output_token_logprobs"]
    logprobs = tuple(float(triple[0]) for triple in triples)
    if ids != tuple(int(triple[1]) for triple in triples):
      raise ContractError(f"{len(ids)} ids do not match their {len(triples)} log-probabilities")
    _check_output(ids, logprobs, finish, request.params)
    return Reply(ids, logprobs, finish["type"] == "stop", int(meta["cached_tokens"]))
  except (KeyError, TypeError, IndexError, ValueError) as error:
    raise ContractError(f"not a reply of /generate ({error!r}): {str(reply)[:300]}") from error


def read_prefill(reply: Mapping[str, Any], request: SampleRequest, tag: str) -> int:
  """Cached tokens of the reply to `prefill_payload`; raises as `read`."""
  try:
    meta = reply["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
      raise Aborted(f"the server aborted the prefill: {meta['finish_reason'].get('message')}")
    _check_prompt(meta, request)
    check_version(meta, tag)
    return int(meta["cached_tokens"])
  except (KeyError, TypeError, ValueError) as error:
    raise ContractError(f"not a reply of /generate ({error!r}): {str(reply)[:300]}") from error


def check_version(meta: Mapping[str, Any], tag: str) -> None:
  """Raises VersionMismatch unless every token of the reply was drawn from the weights `tag`."""
  found = {span["version"] for span in meta.get("weight_versions") or ()} | {meta["weight_version"]}
  if found != {tag}:
    raise VersionMismatch(f"drawn from weights {sorted(map(str, found))}, expected {tag!r}")


def _check_prompt(meta: Mapping[str, Any], request: SampleRequest) -> None:
  if meta["prompt_tokens"] != request.prompt_tokens:
    raise ContractError(
      f"the server counts a prompt of {meta['prompt_tokens']} tokens, we count "
      f"{request.prompt_tokens} ({len(request.ids)} ids, {len(request.images)} images): it "
      "tokenised the ids again, or its image limits resize our pictures (see the size field of its "
      "preprocessor_config.json)"
    )
  ours = sum(image.num_tokens for image in request.images)
  if (meta.get("image_tokens") or 0) != ours:
    raise ContractError(
      f"the server counts {meta.get('image_tokens') or 0} image tokens, we count {ours}"
    )


def _check_output(
  ids: Sequence[int], logprobs: Sequence[float], finish: Mapping[str, Any], params: SamplingParams
) -> None:
  if not 0 < len(ids) <= params.max_new_tokens:
    raise ContractError(f"{len(ids)} new tokens, asked for 1 to {params.max_new_tokens}")
  if bad := [x for x in logprobs if not (math.isfinite(x) and x <= 1e-3)]:
    raise ContractError(f"{bad[0]} is no log-probability")
  if drawn := set(ids) & set(params.banned_ids):
    raise ContractError(f"the server drew the banned ids {sorted(drawn)}")
  if finish["type"] == "stop" and ids[-1] not in params.stop_ids:
    raise ContractError(
      f"the server stopped at id {ids[-1]}, which is not among stop_ids={params.stop_ids}: the "
      "eos_token_id of its checkpoint must be among them"
    )
  if finish["type"] not in ("stop", "length"):
    raise ContractError(f"unknown finish reason {finish!r}")


# Scores: log-probabilities that the server does not report by itself ----------------------------


def needs_score(params: SamplingParams) -> bool:
  """Whether the reported log-probabilities differ from the contract's."""
  tempered_away = params.untempered_logprobs and params.temperature not in (0, 1)
  return bool(params.presence_penalty) or tempered_away


def reported_temperature(params: SamplingParams) -> float:
  """The temperature at which the contract wants the log-probabilities."""
  return params.temperature if params.temperature and not params.untempered_logprobs else 1.0


def score_payload(request: SampleRequest, reply: Reply, images: Sequence[str]) -> dict[str, Any]:
  """The JSON that asks for log p of the sampled ids, and of those that `corrected` needs."""
  seen = reply.ids if reported_temperature(request.params) != 1 else ()
  return _prompt((*request.ids, *reply.ids), images) | {
    "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "ignore_eos": True},
    "return_logprob": True,
    # Expanded position of the last prompt token: the first distribution that is asked for.
    "logprob_start_len": request.prompt_tokens - 1,
    "token_ids_logprob": sorted({*request.params.banned_ids, *seen}),
  }


def corrected(
  score: Mapping[str, Any], request: SampleRequest, reply: Reply, tag: str
) -> tuple[float, ...]:
  """The contract's log-probabilities of `reply.ids`, from the reply to `score_payload`.

  Raises: ContractError, VersionMismatch, Aborted as `read`.
  """
  try:
    meta = score["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
      raise Aborted(f"the server aborted the score: {meta['finish_reason'].get('message')}")
    check_version(meta, tag)
    own = meta["input_token_logprobs"][1:]
    rows = meta["input_token_ids_logprobs"][1:]
    if [triple[1] for triple in own] != list(reply.ids) or len(rows) != len(own):
      raise ContractError(f"the score of {len(reply.ids)} ids covers {len(own)} others")
    tables = [{triple[1]: triple[0] for triple in row or ()} for row in rows]
    own_L = [triple[0] for triple in own]
  except (KeyError, TypeError, IndexError) as error:
    raise ContractError(f"not a score ({error!r}): {str(score)[:300]}") from error
  if reported_temperature(request.params) == 1:
    return tuple(_without(x, table, request.params.banned_ids) for x, table in zip(own_L, tables))
  return _unpenalised(reply, own_L, tables, request.params)


def _without(own: float, table: Mapping[int, float], banned: Sequence[int]) -> float:
  """log p after the banned ids' mass is taken out."""
  rest = 1.0 - math.fsum(math.exp(table[i]) for i in set(banned))
  if rest <= 0:
    raise ContractError("the banned ids hold all of the probability: the weights are broken")
  return own - math.log(rest)


def _unpenalised(
  reply: Reply, own_L: Sequence[float], tables: Sequence[Mapping[int, float]], params: SamplingParams
) -> tuple[float, ...]:
  """Undoes the presence penalty at temperature T.

  With Z' the penalised normaliser, log p(j) under Z' but without j's penalty is
  a_j = a + (l_j - l) / T, where a = reported + penalty / T if the id was seen before. The plain
  normaliser is Z = Z' (1 + sum over seen j of exp(a_j) (1 - exp(-penalty / T))).
  """
  strength = params.presence_penalty / params.temperature
  seen: set[int] = set()
  out = []
  for token, reported, own, table in zip(reply.ids, reply.logprobs, own_L, tables, strict=True):
    a = reported + (strength if token in seen else 0.0)
    moved = math.fsum(math.exp(a + (table[j] - own) / params.temperature) for j in seen)
    out.append(a - math.log1p(moved * -math.expm1(-strength)))
    seen.add(token)
  return tuple(out)


def sample(request: SampleRequest, reply: Reply, logprobs: Sequence[float], cached: int,
           version: int) -> Sample:
  """The finished Sample; `cached` overrides what the server said (see the shared prefill)."""
  return Sample(
    ids=reply.ids, logprobs=tuple(logprobs), finish_reason="stop" if reply.stopped else "length",
    prompt_tokens=request.prompt_tokens, cached_tokens=cached, weight_version=version,
  )  # fmt: skip


def images_to_encode(request: SampleRequest, cached: int, image_token_id: int) -> int:
  """Images of the request that `cached` prompt tokens do not cover: the vision tower must run."""
  place, missing, images = 0, 0, iter(request.images)
  for token in request.ids:
    place += next(images).num_tokens if token == image_token_id else 1
    missing += token == image_token_id and place > cached
  return missing
