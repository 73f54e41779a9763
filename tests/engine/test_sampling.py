"""sampling.py against NumPy: distributions, reported log-probabilities, filters, random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from axpo_jax.engine.embedded import sampling
from axpo_jax.engine.protocol import RequestError, SamplingParams

VOCAB = 101  # not a multiple of any block width


def _sample(logits_BxV, params, seeds, index=0, seen=None):
  rows = len(params)
  arrays = sampling.row_params(params, seeds, rows=rows, width=sampling.list_width(params))
  banned = sampling.id_mask(arrays.banned_BxN, logits_BxV.shape[1])
  index_B = np.broadcast_to(np.asarray(index, np.int32), (rows,))
  seen = None if seen is None else jnp.asarray(seen)
  [noise_BxN] = sampling.noise(arrays.seed_Bx2, index_B, 1, logits_BxV.shape[1])
  ids, logprobs = jax.jit(sampling.sample)(jnp.asarray(logits_BxV), arrays, banned, noise_BxN, seen)
  return np.asarray(ids), np.asarray(logprobs)


def _many(logits_V, params, count, seen_V=None):
  """`count` independent draws from one row's distribution."""
  logits = np.broadcast_to(logits_V, (count, len(logits_V)))
  seen = None if seen_V is None else np.broadcast_to(seen_V, logits.shape)
  return _sample(logits, [params] * count, range(count), seen=seen)


def _reference(logits_V, p, seen_V=None, joint=True):
  """The distribution that is drawn from, written independently: sorts, loops, float64.

  joint: top-p of the whole distribution, SGLang's reading; else of what top-k left, vLLM's.
  """
  z = np.asarray(logits_V, np.float64).copy()
  z[list(p.banned_ids)] = -np.inf
  if seen_V is not None:
    z[seen_V] -= p.presence_penalty
  z /= p.temperature
  order = sorted(range(len(z)), key=lambda i: (-z[i], i))
  kept = order[: p.top_k] if p.top_k else order
  probs = np.exp(z[kept] - z[kept].max())
  whole = np.exp(z - z[kept].max()).sum() if joint else probs.sum()
  probs /= whole
  total, stop = 0.0, len(kept)
  for rank, prob in enumerate(probs):
    total += prob
    if total >= p.top_p - 1e-9:
      stop = rank + 1
      break
  out = np.zeros(len(z))
  out[kept[:stop]] = probs[:stop] / probs[:stop].sum()
  return out


def _logits(seed=0, scale=2.0):
  return (np.random.default_rng(seed).normal(size=VOCAB) * scale).astype(np.float32)


def _assert_drawn_from(ids, probs_V):
  observed = np.bincount(ids, minlength=len(probs_V))
  assert observed[probs_V == 0].sum() == 0
  expected = probs_V * len(ids)
  # Cells with few expected counts are pooled, as the chi-square approximation wants.
  large = expected >= 5
  observed = np.append(observed[large], observed[~large].sum())
  expected = np.append(expected[large], expected[~large].sum())
  keep = expected > 1e-6
  assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


@pytest.mark.parametrize(
  "params",
  [
    SamplingParams(1),
    SamplingParams(1, temperature=0.6),
    SamplingParams(1, temperature=1.7, banned_ids=(3, 100)),
    SamplingParams(1, top_k=5),
    SamplingParams(1, top_k=90),
    SamplingParams(1, top_p=0.8),
    SamplingParams(1, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
  ],
  ids=str,
)
def test_draws_follow_the_reference_distribution(params):
  logits, seen = _logits(), np.zeros(VOCAB, bool)
  seen[np.argsort(-logits)[:4]] = True
  seen_V = seen if params.presence_penalty else None
  ids, _ = _many(logits, params, 20_000, seen_V)
  _assert_drawn_from(ids, _reference(logits, params, seen_V))


@pytest.mark.parametrize("top_k, top_p", [(20, 0.22), (80, 0.7)])
def test_top_k_and_top_p_are_joint_as_in_sglang(top_k, top_p):
  logits = np.linspace(0.5, 0.0, VOCAB, dtype=np.float32)
  params = SamplingParams(1, temperature=0.7, top_p=top_p, top_k=top_k)
  ids, _ = _many(logits, params, 20_000)
  sglang, vllm = (_reference(logits, params, joint=joint) for joint in (True, False))
  assert (vllm > 0).sum() < (sglang > 0).sum() < top_k
  _assert_drawn_from(ids, sglang)


def test_at_the_papers_settings_twenty_ids_are_kept_where_vllm_keeps_nine():
  """Eight likely ids and a flat tail: of the first twenty's mass nine ids are the nucleus."""
  probs = np.concatenate([np.full(8, 0.042), np.full(VOCAB - 8, 0.664 / (VOCAB - 8))])
  params = SamplingParams(1, temperature=0.7, top_p=0.8, top_k=20)
  logits = (0.7 * np.log(probs) + np.linspace(1e-3, 0, VOCAB)).astype(np.float32)  # no ties
  sglang, vllm = (np.flatnonzero(_reference(logits, params, joint=joint)) for joint in (True, False))
  assert (len(sglang), len(vllm)) == (20, 9)
  ids, _ = _many(logits, params, 20_000)
  assert set(ids) == set(sglang)


def test_logprobs_are_the_policys_own():
  logits = _logits(1)
  params = SamplingParams(1, 0.7, 0.8, 10, 1.5, banned_ids=(int(np.argmax(logits)),))
  ids, logprobs = _many(logits, params, 200, np.arange(VOCAB) % 2 == 0)
  z = logits.astype(np.float64)
  z[params.banned_ids[0]] = -np.inf
  z /= 0.7
  np.testing.assert_allclose(logprobs, (z - np.log(np.exp(z).sum()))[ids], atol=1e-5)


def test_greedy_is_the_first_maximum_and_reports_temperature_one():
  logits = np.stack([_logits(seed) for seed in range(8)])
  logits[0, [7, 70]] = 50.0  # a tie, in different blocks
  ids, logprobs = _sample(logits, [SamplingParams(1, temperature=0)] * 8, range(8))
  assert ids.tolist() == np.argmax(logits, 1).tolist()
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[np.arange(8), ids], atol=1e-5)


@pytest.mark.parametrize("params", [SamplingParams(1, top_k=1), SamplingParams(1, top_p=1e-6)])
def test_narrow_filters_are_greedy_even_on_ties(params):
  logits = np.zeros((8, VOCAB), np.float32)
  logits[:, [11, 55]] = np.arange(8)[:, None]
  ids, _ = _sample(logits, [params] * 8, range(8))
  assert ids.tolist() == [0] + [11] * 7


@pytest.mark.parametrize("params", [SamplingParams(1, top_k=7), SamplingParams(1, top_p=0.4),
                                    SamplingParams(1, top_k=9, top_p=0.3)], ids=str)
def test_ties_at_the_cut_are_kept_by_lower_id(params):
  """Few different values, negative, zero of both signs and positive, so that every cut is among equals."""
  rng = np.random.default_rng(0)
  logits = rng.integers(-2, 3, (200, VOCAB)).astype(np.float32) * 0.25
  logits[logits == 0] *= rng.choice([-1.0, 1.0], (logits == 0).sum())
  arrays = sampling.row_params([params] * 200, range(200), rows=200, width=4)
  kept = np.isfinite(jax.jit(sampling._keep_likely)(logits, arrays))
  wanted = np.stack([_reference(row, params) > 0 for row in logits])
  np.testing.assert_array_equal(kept, wanted)


def test_banned_ids_are_never_drawn_however_likely():
  logits = _logits()
  logits[[4, 9]] = 1e4
  ids, logprobs = _many(logits, SamplingParams(1, banned_ids=(4, 9)), 2_000)
  assert not np.isin(ids, [4, 9]).any()
  assert np.isfinite(logprobs).all() and logprobs.min() > -30


def test_a_row_does_not_feel_its_company_or_its_place():
  logits = np.stack([_logits(seed) for seed in range(10)])
  odd = SamplingParams(1, temperature=0.7, top_p=0.8, top_k=70, presence_penalty=2.0)
  params = [SamplingParams(1)] * 5 + [odd, SamplingParams(1, 0), SamplingParams(1, top_k=3)] * 2
  params, seeds = params[:10], [1000 + i for i in range(10)]
  together, _ = _sample(logits, params, seeds, index=5)
  order = np.random.default_rng(3).permutation(10)
  shuffled, _ = _sample(logits[order], [params[i] for i in order], [seeds[i] for i in order], 5)
  assert shuffled.tolist() == together[order].tolist()
  for i in range(10):
    alone, _ = _sample(logits[i : i + 1], [params[i]], [seeds[i]], index=5)
    assert alone[0] == together[i]


def test_streams_differ_by_seed_by_high_word_and_by_index():
  flat = np.zeros((64, VOCAB), np.float32)
  params = [SamplingParams(1)] * 64
  base, _ = _sample(flat, params, range(64))
  high, _ = _sample(flat, params, [i + (1 << 32) for i in range(64)])
  later, _ = _sample(flat, params, range(64), index=1)
  negative, _ = _sample(flat, params, [-1 - i for i in range(64)])
  for other in (high, later, negative):
    assert (base == other).mean() < 0.2
  assert sampling.seed_words(-1) == (0xFFFFFFFF, 0xFFFFFFFF)


def test_list_width_and_padding():
  assert sampling.list_width([]) == 4
  assert sampling.list_width([SamplingParams(1, stop_ids=tuple(range(5)))]) == 8
  mask = np.asarray(sampling.id_mask(jnp.asarray([[2, -1], [-1, -1]]), 4))
  assert mask.tolist() == [[False, False, True, False], [False] * 4]


@pytest.mark.parametrize(
  "bad",
  [
    {"max_new_tokens": 0},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"presence_penalty": float("inf")},
  ],
)
def test_bad_parameters_are_refused_by_name(bad):
  with pytest.raises(RequestError, match=next(iter(bad))):
    SamplingParams(**{"max_new_tokens": 1, **bad})
