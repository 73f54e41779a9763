"""The routes of one SGLang server, as asynchronous calls that end in time.

In: JSON payloads. Out: decoded JSON, or a typed error. Nothing is retried here and nothing known
about other servers; every call has its own time limit.

A connection lives for one call. A generation takes seconds and a connection a fraction of a
millisecond, and a server that was restarted never meets a connection to its predecessor.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from typing import Any

import aiohttp
import orjson

from axpo_jax.engine.protocol import RequestError
from axpo_jax.engine.settings import DELTA_LOADER


class ServerError(RuntimeError):
  """A server failed to do what it was asked; another one may succeed."""


class Unreachable(ServerError):
  """No connection, a connection that broke, or no answer in time."""


class TooSlow(ServerError):
  """No answer in time to a request that may take long; it says nothing about the server's health."""


class BadStatus(ServerError):
  """An HTTP status that says the server is at fault (5xx, or an unexpected one)."""


class Garbage(ServerError):
  """A body that is not the JSON it should be."""


class LoadError(ServerError):
  """The server did not take the weights."""


class Server:
  """One server.

  Args:
    url: its base, such as http://127.0.0.1:30000.
    api_key: sent as a bearer token; empty for none.
  """

  def __init__(self, url: str, api_key: str = ""):
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"{url!r} is no base URL: write http://host:port")
    self.url = url.rstrip("/")
    self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

  async def generate(self, payload: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One sample.

    Raises:
      RequestError: the server refuses the request as it stands (400).
      TooSlow: no answer within `timeout`; the request may still run there, see `abort`.
      ServerError: anything else that went wrong.
    """
    return await self._call("POST", "/generate", payload, timeout, refusal=RequestError, late=TooSlow)

  async def abort(self, rid: str, timeout: float) -> None:
    """Ends the request of this id, if it runs or waits."""
    await self._call("POST", "/abort_request", {"rid": rid}, timeout, expect_json=False)

  async def healthy(self, timeout: float) -> bool:
    """Whether the whole engine answers: the server draws a token, or has just done so."""
    try:
      await self._call("GET", "/health", None, timeout, expect_json=False)
    except ServerError:
      return False
    return True

  async def weight_tag(self, timeout: float) -> str:
    """The version tag of the weights that are loaded. (`/server_info` shows a stale one.)"""
    info = await self._call("GET", "/model_info", None, timeout)
    return str(info.get("weight_version"))

  async def info(self, timeout: float) -> dict[str, Any]:
    """How the server was started: context_length, max_req_input_len, dtype and more."""
    return await self._call("GET", "/server_info", None, timeout)

  async def pause(self, timeout: float) -> None:
    """Aborts what runs and lets nothing start until `resume`."""
    await self._call("POST", "/pause_generation", {"mode": "abort"}, timeout, expect_json=False)

  async def resume(self, timeout: float) -> None:
    await self._call("POST", "/continue_generation", {}, timeout, expect_json=False)

  async def load(self, folder: str, tag: str, timeout: float) -> None:
    """Loads every safetensors file of `folder` over the weights and empties the prefix cache.

    The folder is opened by the server, and may hold a part of the tensors. A tensor with an unknown
    name or a wrong shape is skipped without an error: see `checksums`.

    Raises:
      LoadError: the server says that it failed.
      ServerError: it failed otherwise.
    """
    request = {"model_path": folder, "weight_version": tag, "flush_cache": True}
    answer = await self._call("POST", "/update_weights_from_disk", request, timeout, refusal=LoadError)
    if not answer.get("success"):
      raise LoadError(f"{self.url} did not load {folder}: {answer.get('message')}")

  async def apply_delta(self, folder: str, tag: str, ranks: int, timeout: float) -> None:
    """Loads the values that changed, by the loader that servers of the sidecar have (server/axpo_delta.py).

    Args:
      ranks: the server's tensor parallelism: each rank reads the folder.

    Raises: as `load`.
    """
    with contextlib.suppress(LoadError):  # there is none to end, unless a trainer died in the middle of this
      await self._call("POST", "/end_weight_update", {}, timeout, refusal=LoadError)
    await self._call("POST", "/begin_weight_update", {}, timeout, refusal=LoadError)
    try:
      request = {"serialized_named_tensors": [_named(folder)] * ranks, "load_format": DELTA_LOADER,
                 "weight_version": tag, "flush_cache": True}
      await self._call("POST", "/update_weights_from_tensor", request, timeout, refusal=LoadError)
    finally:
      await self._call("POST", "/end_weight_update", {}, timeout, refusal=LoadError)

  async def flush(self, timeout: float) -> None:
    """Empties the prefix cache, once nothing runs."""
    await self._call("POST", f"/flush_cache?timeout={timeout / 2:g}", None, timeout, expect_json=False)

  async def checksums(self, timeout: float) -> dict[str, str]:
    """Checksum of every tensor that the server holds, by rank and the server's own names.

    Keys are "<rank>/<name>": servers with the same parallel layout and weights agree in all of them.
    """
    answer = await self._call("POST", "/weights_checker", {"action": "checksum"}, timeout)
    try:
      return {f"{number}/{name}": value for number, rank in enumerate(answer["ranks"])
              for name, value in rank["checksums"].items()}
    except (KeyError, TypeError, AttributeError) as error:
      raise Garbage(f"{self.url} /weights_checker: {error!r} in {str(answer)[:300]}") from error

  async def _call(self, method: str, route: str, body: Any, timeout: float, *,
                  refusal: type[Exception] = BadStatus, late: type[ServerError] = Unreachable,
                  expect_json: bool = True) -> Any:
    where = f"{self.url}{route}"
    limit = aiohttp.ClientTimeout(total=timeout)
    try:
      # orjson: with images in the request the standard library's encoder takes five times as long, on the event loop.
      sent = {} if body is None else {"data": orjson.dumps(body), "headers": {"Content-Type": "application/json"}}
      async with (aiohttp.ClientSession(timeout=limit, headers=self._headers) as session,
                  session.request(method, where, **sent) as response):
        text = await response.text(errors="replace")
        status = response.status
    except TimeoutError as error:
      raise late(f"{where} gave no answer within {timeout:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
      raise Unreachable(f"{where}: {type(error).__name__}: {error}") from error
    if status == 400:
      raise refusal(f"{where} refuses: {text[:500]}")
    if status != 200:
      raise BadStatus(f"{where} answers {status}: {text[:500]}")
    return _json_object(where, text) if expect_json else None


def _named(name: str) -> str:
  """The pickled list [(name, torch.Tensor())] in base64, written by hand since the trainer has no torch.

  SGLang hands a loader tensors with names. Ours needs the name of a folder and no tensor.
  """
  text = name.encode()
  pickled = b"\x80\x02]X" + struct.pack("<I", len(text)) + text + b"ctorch\nTensor\n)R\x86a."
  return base64.b64encode(pickled).decode()


def _json_object(where: str, text: str) -> dict[str, Any]:
  try:
    answer = json.loads(text)
  except ValueError as error:
    raise Garbage(f"{where} answers with something that is not JSON: {text[:200]!r}") from error
  if not isinstance(answer, dict):
    raise Garbage(f"{where} answers with a {type(answer).__name__}, not an object: {text[:200]!r}")
  return answer
