"""The SGLang engine against a real server: weights, prefixes, routes, and replies that are wrong.

What every engine must do is in test_engine.py; servers that die or freeze are in test_sglang_faults.py.
"""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiohttp import web

from axpo_jax.engine.protocol import EngineClosed, RequestError
from axpo_jax.engine.settings import FleetConfig, PushConfig, SGLangConfig
from axpo_jax.engine.sglang import api, wire
from axpo_jax.engine.sglang.api import BadStatus, Garbage, Server
from axpo_jax.engine.sglang.engine import SGLangEngine
from axpo_jax.engine.sglang.fleet import NoServer
from axpo_jax.engine.sglang.image_sender import ImageSender


@pytest.fixture
def engine(connect, server, reference):
  """An engine of its own on the shared server, holding the reference's weights as version 3."""
  made = connect(server.urls)
  asyncio.run(made.update_weights(reference.params, 3))
  yield made
  asyncio.run(made.close())


@pytest.fixture
def spoilt(connect, server, proxy, reference):
  """An engine whose server is behind a proxy, and the proxy."""
  between = proxy(server.urls[0])
  made = connect([between.url], fleet={"probe_s": 0.1, "deadline_s": 20.0}, attempts=2)
  asyncio.run(made.update_weights(reference.params, 3))
  yield made, between
  asyncio.run(made.close())


def run(engine, *requests):
  async def together():
    return await asyncio.gather(*map(engine.generate, requests))

  return asyncio.run(together())


def assert_from(reference, request, sample, atol=1e-4):
  """The sample's log-probabilities are those of the reference's weights."""
  expected = reference.logprobs(request.ids, request.images, sample.ids)
  np.testing.assert_allclose(sample.logprobs, expected, atol=atol)


# Weights ----------------------------------------------------------------------------------------


def test_a_push_replaces_weights_and_prefixes(engine, reference, other_params, ask, text, image, picture):
  request = ask(text(0, 9) + picture + text(1, 9), (image(0),), 12)
  ((before,),) = run(engine, request)
  ((cached,),) = run(engine, request)
  assert cached.cached_tokens == cached.prompt_tokens - 1
  asyncio.run(engine.update_weights(other_params, 4))
  ((after,),) = run(engine, request)
  assert (before.weight_version, after.weight_version) == (3, 4) and after.cached_tokens == 0
  assert_from(reference, request, before)
  assert_from(reference.with_params(other_params), request, after)


def test_a_small_change_arrives(engine, reference, ask, text, image, picture):
  """One matrix of one layer changes, and nothing else on the server."""
  def bump(path, leaf):
    return leaf.at[1].add(0.05) if "down" in str(path) else leaf

  params = jax.tree_util.tree_map_with_path(bump, reference.params)
  asyncio.run(engine.update_weights(params, 4))
  push = engine.last_push
  assert push.changed == {"model.language_model.layers.1.mlp.down_proj.weight"}
  request = ask(text(0, 9) + picture + text(1, 9), (image(0),), 12)
  ((sample,),) = run(engine, request)
  assert_from(reference.with_params(params), request, sample)
  assert np.abs(reference.logprobs(request.ids, request.images, sample.ids)
                - sample.logprobs).max() > 1e-3


def test_deltas_give_a_server_the_weights_of_a_whole_push(connect, server, reference, ask, text, image, picture):
  """Checksums of all its tensors after three deltas are those after one whole push."""
  rng, params, engine = np.random.default_rng(0), reference.params, connect(server.urls)
  asyncio.run(engine.update_weights(params, 0))
  whole = engine.last_push
  for version, share in enumerate((0.002, 0.25, 0.002), 1):
    params = jax.tree.map(
      lambda x: jnp.where(rng.random(x.shape) < share, x + 0.01, x), params)  # noqa: B023
    asyncio.run(engine.update_weights(params, version))
    assert engine.last_push.previous is not None
  assert engine.last_push.bytes_written < 0.02 * whole.bytes_written
  request = ask(text(0, 9) + picture + text(1, 9), (image(0),), 12)
  ((sample,),) = run(engine, request)
  assert_from(reference.with_params(params), request, sample)
  by_deltas = asyncio.run(Server(server.urls[0]).checksums(60.0))
  asyncio.run(engine.close())  # two would replace each other's weights for ever
  other = connect(server.urls, push={"delta": False})
  asyncio.run(other.update_weights(params, 9))
  whole_push = asyncio.run(Server(server.urls[0]).checksums(60.0))
  asyncio.run(other.close())
  assert whole_push == by_deltas


def test_a_trainer_that_died_in_a_delta_leaves_no_server_unusable(engine, server, reference, other_params):
  asyncio.run(Server(server.urls[0])._call("POST", "/begin_weight_update", {}, 60.0))
  asyncio.run(engine.update_weights(other_params, 4))
  assert engine.last_push.previous is not None and engine.gauges()["servers_lost"] == 0


@pytest.mark.parametrize("route", ["model_path", "serialized_named_tensors"])
def test_weights_that_the_server_ignores_are_noticed(spoilt, reference, other_params, route):
  """A server answers success for a folder without a single known tensor."""
  engine, between = spoilt
  old = engine.last_push.folder
  if route == "model_path":
    engine.folder._whole_bytes = 0  # so that the next push is whole
    between.before["/update_weights_from_disk"] = lambda sent: {**sent, "model_path": str(old)}
  else:
    between.before["/update_weights_from_tensor"] = lambda sent: {**sent, route: [api._named(str(old))]}
  engine._fleet.config = FleetConfig(probe_s=0.1, deadline_s=4.0)
  with pytest.raises(NoServer, match="did not take the push as written"):
    asyncio.run(engine.update_weights(other_params, 4))
  assert engine.gauges()["servers_healthy"] == 0


def test_bfloat16_pushes_and_servers_in_float32_agree_on_what_changed(
    connect, server, reference, other_params):
  engine = connect(server.urls, push={"dtype": "bfloat16"})
  for version, params in enumerate((reference.params, other_params, reference.params)):
    asyncio.run(engine.update_weights(params, version))
    assert engine.gauges()["servers_healthy"] == len(server.urls)  # their checksums are those of the push
  asyncio.run(engine.close())


def test_a_server_that_is_too_short_is_refused(model_config, server, reference, tmp_path):
  engine = SGLangEngine(server.urls, model_config, SGLangConfig(
    push=PushConfig(str(tmp_path)), length=4096, fleet=FleetConfig(probe_s=0.1, deadline_s=5.0)))
  with pytest.raises(NoServer, match=r"prompts of up to 122 tokens.*--context-length=4112"):
    asyncio.run(engine.update_weights(reference.params, 0))
  asyncio.run(engine.close())


def test_sampling_needs_weights(connect, server, ask, text):
  engine = connect(server.urls)
  with pytest.raises(RequestError, match="update_weights first"):
    run(engine, ask(text(0, 5)))
  asyncio.run(engine.close())


# Prompts and prefixes ---------------------------------------------------------------------------


def test_resamples_find_their_prefix_with_its_images(engine, ask, text, image, picture):
  """AXPO's case: two images, a turn that was cut, K continuations that come one by one."""
  ids = text(0, 8) + picture + text(1, 8) + picture + text(2, 8)
  images = (image(1, 6, 6), image(2, 8, 4))
  ((source,),) = run(engine, ask(ids, images, 20, session="q"))
  prefix = ids + source.ids[:12]
  engine.stats(reset=True)
  done = run(engine, *(ask(prefix, images, 10, seeds=(k,), session="q") for k in range(4)))
  shares = [sample.cached_tokens / sample.prompt_tokens for (sample,) in done]
  assert min(shares) >= 0.95
  assert engine.stats().images_encoded == 0


def test_images_by_path(connect, server, reference, ask, text, image, picture, tmp_path):
  folder = tmp_path / "images"
  engine = connect(server.urls, image_folder=str(folder))
  asyncio.run(engine.update_weights(reference.params, 0))
  request = ask(text(0, 9) + picture + text(1, 9), (image(0),), 12)
  ((sample,),) = run(engine, request)
  assert_from(reference, request, sample)
  assert [file.stem for file in folder.iterdir()] == [image(0).key]
  asyncio.run(engine.close())
  assert not list(folder.iterdir())


def test_an_image_is_encoded_once_and_sent_alike(spoilt, ask, text, image, picture):
  engine, between = spoilt
  for turn in range(3):
    run(engine, ask(text(0, 9) + picture + text(1, 1 + turn), (image(5),), 2))
  sent = [request["image_data"] for request in between.seen["/generate"] if "image_data" in request]
  assert len(sent) == 3 and len({url for (url,) in sent}) == 1


def test_ids_outside_the_vocabulary_never_leave(spoilt, ask):
  """One of them ends a real server's process."""
  engine, between = spoilt
  calls = len(between.seen["/generate"])
  for request in (ask((5, 92)), ask((5, -1)), ask((5, 6), banned_ids=(92,)), ask((5,), stop_ids=(99,))):
    with pytest.raises(RequestError, match="outside the vocabulary of 92"):
      run(engine, request)
  assert len(between.seen["/generate"]) == calls


def test_a_request_that_the_server_refuses_is_not_its_fault(engine, ask, text):
  with pytest.raises(RequestError, match="presence_penalty must be in"):
    run(engine, ask(text(0, 5), presence_penalty=3.0))
  assert engine.gauges().items() >= {"servers_healthy": 1, "servers_lost": 0, "retries": 0}.items()


def test_the_engine_outlives_event_loops_and_closes_once(connect, server, reference, ask, text):
  engine = connect(server.urls)
  asyncio.run(engine.update_weights(reference.params, 0))
  for i in range(3):
    run(engine, ask(text(i, 5)))

  async def closed_in_flight():
    request = ask(text(0, 5), max_new=80, seeds=range(16))
    task = asyncio.create_task(engine.generate(request))
    while not engine._fleet._leases:
      await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineClosed):
      await task

  asyncio.run(closed_in_flight())
  asyncio.run(engine.close())
  with pytest.raises(EngineClosed):
    run(engine, ask(text(0, 5)))
  assert not engine.last_push.folder.exists()


# Replies that are wrong -------------------------------------------------------------------------


def _with_meta(**fields):
  def change(answer):
    return {**answer, "meta_info": {**answer["meta_info"], **fields}}

  return change


def _without_last_id(answer):
  return {**answer, "output_ids": answer["output_ids"][:-1]}


WRONG = {
  "images": (_with_meta(image_tokens=5), wire.ContractError, "counts 5 image tokens, we count 6"),
  "ids": (_without_last_id, wire.ContractError, "7 ids do not match their 8 log-prob"),
  "version": (_with_meta(weight_version="3-else"), wire.VersionMismatch, "'3-else'"),
  "span": (_with_meta(weight_versions=[{"version": "x", "start": 0, "end": 1}]),
           wire.VersionMismatch, "'x'"),
  "shape": (lambda answer: {"output_ids": []}, wire.ContractError, "meta_info"),
  "stop": (_with_meta(finish_reason={"type": "stop", "matched": 7}), wire.ContractError,
           "not among stop_ids"),
  "abort": (lambda answer: _with_meta(finish_reason={"type": "abort", "message": "full"})(answer) | {
    "output_ids": []}, wire.Aborted, "full"),
}  # fmt: skip


@pytest.fixture(scope="module")
def genuine(connect, server, reference, ask, text, image, picture):
  """A request, what the server answered, and the tag of its weights."""
  engine = connect(server.urls)
  asyncio.run(engine.update_weights(reference.params, 3))
  request = ask(text(0, 10) + picture + text(1, 8), (image(0),))
  images = asyncio.run(ImageSender("", 1 << 20).encode(request.images))
  payload = wire.payload(request, 0, images, 96)
  answer = asyncio.run(Server(server.urls[0]).generate(payload, 30))
  asyncio.run(engine.close())
  return request, answer, engine.last_push.tag


def test_a_sound_reply_is_read(genuine, reference):
  request, answer, tag = genuine
  reply = wire.read(answer, request, tag)
  assert len(reply.ids) == 8 and reply.finish == "length" and reply.cached_tokens == 0
  assert_from(reference, request, reply)


@pytest.mark.parametrize("change, error, message", WRONG.values(), ids=WRONG)
def test_a_wrong_reply_is_named(genuine, change, error, message):
  request, answer, tag = genuine
  with pytest.raises(error, match=message):
    wire.read(change(answer), request, tag)


def test_the_prompt_must_have_been_counted_as_we_count(genuine, spoilt):
  """Once is asked again; always is an error with both counts."""
  engine, between = spoilt
  request, lie = genuine[0], _with_meta(prompt_tokens=99)
  between.after["/generate"] = lambda answer: lie(answer) if engine.retries == 0 else answer
  ((sample,),) = run(engine, request)
  assert sample.prompt_tokens == 26 and sample.weight_version == 3
  assert engine.retries == 1 and engine.stats().samples == 1
  between.after["/generate"] = lie
  with pytest.raises(wire.ContractError, match="a prompt of 99 tokens, we count 26"):
    run(engine, request)
  assert engine.stats().samples == 1


@pytest.mark.parametrize("text_of, message", [(str, "not JSON"), (lambda answer: [answer], "a list")])
def test_garbage_is_named(spoilt, genuine, text_of, message):
  engine, between = spoilt
  between.after["/generate"] = text_of
  with pytest.raises(Garbage, match=message):
    run(engine, genuine[0])


def test_a_server_that_answers_500_is_asked_again(spoilt, ask, text):
  engine, between = spoilt
  between.before["/generate"] = lambda _: web.Response(status=500) if not engine.retries else None
  run(engine, ask(text(0, 10)))
  assert engine.retries == 1
  between.before["/generate"] = lambda _: web.Response(status=500, text="out of memory")
  with pytest.raises(BadStatus, match="500: out of memory"):
    run(engine, ask(text(0, 10)))


def test_a_server_ends_a_request_by_its_id(server, ask, text):
  """As the engine ends one that takes too long.

  A fast machine draws 80 tokens before an abort arrives. So the request comes last of more than run
  at once (8): it ends while it waits, or while it runs.
  """
  api, request = Server(server.urls[0]), ask(text(0, 9), max_new=80)

  async def scenario():
    running = [asyncio.create_task(api.generate(
      wire.payload(request, 0, (), 96) | {"rid": rid}, 60)) for rid in (*map(str, range(24)), "slow")]
    while not running[-1].done():  # it may not have arrived yet
      await api.abort("slow", 5)
    return [answer["meta_info"]["finish_reason"]["type"] for answer in await asyncio.gather(*running)]

  assert asyncio.run(scenario()) == ["length"] * 24 + ["abort"]


def test_an_update_interrupts_and_keeps_what_was_drawn(connect, server, reference, other_params, ask, text):
  """What ran hands back the tokens of the old weights, what waited is drawn from the new ones."""
  engine = connect(server.urls)
  asyncio.run(engine.update_weights(reference.params, 0))
  push = engine.folder.write(other_params, 1)
  requests = [ask(text(0, 9), max_new=24 + 2 * n, seeds=(n,)) for n in range(28)]  # of which 8 run at once

  async def scenario():
    running = [asyncio.create_task(engine.generate(request)) for request in requests]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    await engine.install(push)
    return await asyncio.gather(*running)

  samples = [sample for (sample,) in asyncio.run(scenario())]
  for request, sample in zip(requests, samples):
    weights = reference.with_params(other_params) if sample.weight_version else reference
    assert_from(weights, request, sample)
    whole = sample.finish_reason == "length"
    assert len(sample.ids) == request.params.max_new_tokens if whole else sample.weight_version == 0
  interrupted = [sample for sample in samples if sample.finish_reason == "abort"]
  assert interrupted and engine.gauges()["interrupted"] == len(interrupted)
  assert engine.retries == 0 and {sample.weight_version for sample in samples} == {0, 1}
  asyncio.run(engine.close())


def test_a_request_that_takes_too_long_keeps_its_tokens(connect, server, reference, ask, text):
  engine = connect(server.urls, request_s=0.1)
  asyncio.run(engine.update_weights(reference.params, 0))
  requests = [ask(text(0, 9), max_new=80, seeds=(n,)) for n in range(16)]
  found = []

  async def scenario():
    for _ in range(20):  # a fast machine may finish them all
      found.extend(zip(requests, await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)))
      if engine.interrupted:
        return

  asyncio.run(scenario())
  kept = [(request, sample[0]) for request, sample in found
          if isinstance(sample, list) and sample[0].finish_reason == "abort"]
  assert kept and engine.too_slow >= len(kept)
  for request, sample in kept:
    assert 0 < len(sample.ids) < 80
    assert_from(reference, request, sample)
  asyncio.run(engine.close())


def test_nobody_there(connect, reference, ask, text):
  engine = connect(["http://127.0.0.1:9"], fleet={"deadline_s": 0.5, "probe_s": 0.1})
  with pytest.raises(NoServer, match=r"none of 1 servers .* 0\.5 s \(deadline_s\): http://127.0.0.1:9"):
    asyncio.run(engine.update_weights(reference.params, 0))
  asyncio.run(engine.close())


@pytest.mark.parametrize("make", [
  lambda: Server("127.0.0.1:30000"),
  lambda: FleetConfig(probe_s=0),
  lambda: SGLangConfig(push=PushConfig("x"), attempts=0),
  lambda: SGLangConfig(push=PushConfig("x"), drain_s=-1.0),
])
def test_configs_that_cannot_work(make):
  with pytest.raises(ValueError):
    make()
