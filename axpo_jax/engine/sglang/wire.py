"""SGLang's `/generate`: from our requests to its JSON, and from its JSON to our samples.

In: a SampleRequest and its encoded images. Out: payloads; and, from the replies, Samples whose
numbers obey the engine's contract. Pure functions: nothing here talks to a server.

Every reply is checked against what was asked. A server that counts another prompt than we do has
tokenised the ids again or expanded an image twice, and everything behind that point would be
trained on wrong positions: `ContractError` names both counts.

Log-probabilities. The server reports them after the logit bias, the penalties and the temperature,
and before top-k and top-p. Without a presence penalty that is our contract (see SamplingParams). With
one, which evaluations use, they are those of the penalised distribution, and are taken as they are: the
exact ones would cost scores of (length x distinct ids), and nothing is trained on an evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from axpo_jax.engine.protocol import FinishReason, Sample, SampleRequest, SamplingParams
from axpo_jax.engine.sglang.api import ServerError

# Added to a banned id's logit: its probability is then an exact zero in any float type.
BAN_BIAS = -1e9
_MAX_SEED = 2**63 - 1


class ContractError(ServerError):
  """A reply that breaks the engine's contract: counts, ids or log-probabilities that do not fit."""


class VersionMismatch(ContractError):
  """A reply that was drawn, wholly or in part, from other weights than the server should hold."""


class Aborted(ServerError):
  """The server cut the request short before it drew a token."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """One checked reply.

  ids, logprobs: as the server gave them, the stop id included.
  finish: "abort" if the server cut it short (an update of the weights, a time limit): the ids so far
    are as good as any.
  cached_tokens: expanded prompt tokens that the server took from its cache.
  """

  ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish: FinishReason
  cached_tokens: int


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
    Aborted: the server cut the request short and there is no token to keep.
    ContractError: counts, ids or log-probabilities do not fit the request, or the JSON is not
      SGLang's. VersionMismatch: wrong weights.
  """
  try:
    meta = reply["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort" and not reply.get("output_ids"):
      raise Aborted(f"the server aborted the request: {finish.get('message')}")
    _check_prompt(meta, request)
    check_version(meta, tag)
    ids = tuple(int(i) for i in reply["output_ids"])
    triples = meta["output_token_logprobs"]
    logprobs = tuple(float(triple[0]) for triple in triples)
    if ids != tuple(int(triple[1]) for triple in triples):
      raise ContractError(f"{len(ids)} ids do not match their {len(triples)} log-probabilities")
    _check_output(ids, logprobs, finish, request.params)
    return Reply(ids, logprobs, finish["type"], int(meta["cached_tokens"]))
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
  if finish["type"] not in get_args(FinishReason):
    raise ContractError(f"unknown finish reason {finish!r}")


def sample(request: SampleRequest, reply: Reply, cached: int, version: int) -> Sample:
  """The finished Sample; `cached` overrides what the server said (see the shared prefill)."""
  return Sample(
    ids=reply.ids, logprobs=reply.logprobs, finish_reason=reply.finish,
    prompt_tokens=request.prompt_tokens, cached_tokens=cached, weight_version=version,
  )  # fmt: skip


def images_to_encode(request: SampleRequest, cached: int, image_token_id: int) -> int:
  """Images of the request that `cached` prompt tokens do not cover: the vision tower must run."""
  position, missing, images = 0, 0, iter(request.images)
  for token in request.ids:
    position += next(images).num_tokens if token == image_token_id else 1
    missing += token == image_token_id and position > cached
  return missing
