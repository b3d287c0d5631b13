"""SGLang's HTTP, one typed call each. Nothing else in the project knows its endpoints or field names."""

import errno
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import SamplingParams
from gtpo_megatron.trajectories.record import FinishReason

TEXT_ANSWERS = ("/flush_cache", "/abort_request")
# what is not confirmed has not happened: an answer of something else, in front of the server, must not pass for its own
CONFIRMED = (
    "/init_weights_update_group",
    "/begin_weight_update",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/end_weight_update",
)
ROUTER_S = 5.0  # for what a router answers by itself
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class ServerFault(Exception):
    """A server did not answer, or not sensibly: the request may be sent elsewhere. The text names URL and answer."""


class NoServer(ServerFault):
    """Nothing listens at the address: what was there has ended, and its connections with it."""


class Refused(UserError):
    """A server understood a request and refused it (4xx): no other server will do better."""


@dataclass(frozen=True, eq=False)
class Sample:
    """What one /generate answered."""

    token_ids: NDArray[np.int32]  # [L]
    logprobs: NDArray[np.float32]  # [L]
    versions: tuple[str, ...]  # [L], the server's name of the weights of each token
    finish_reason: FinishReason
    weight_version: str  # of the weights at the end, also where L is 0


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself."""

    tensor: int
    weight_version: str
    architectures: tuple[str, ...] = ()
    dtype: str = "auto"
    model_path: str = ""


class Client:
    """Asynchronous calls; made in the event loop that it belongs to.

    On aiohttp, because thousands of requests are in flight on a cluster: httpx's connection pool walks through all of
    them at every start and end of one (measured: 16 ms of CPU a request with 512 in flight, where this takes 0.3).
    """

    def __init__(self, api_key: str | None, request_timeout_s: float) -> None:
        self.request_timeout_s = request_timeout_s
        self._key = api_key
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # A server drops idle connections after 5 s; a request that meets this moment would look like a fault.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            trust_env=False,  # proxies of the environment are not for servers of this run
        )

    async def close(self) -> None:
        await self._http.close()

    async def call(
        self, url: str, path: str, body: dict[str, Any] | None, timeout_s: float, method: str | None = None
    ) -> Any:
        """POST `body` (GET without one) and return the decoded answer; None where SGLang answers in prose.

        Raises:
            NoServer: the connection was refused.
            ServerFault: no answer in time, a broken connection, a 5xx, an answer that is not JSON, or one that does not confirm what
                it must (CONFIRMED).
            Refused: a 4xx.
        """
        method = method or ("GET" if body is None else "POST")
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, 10.0))
        try:
            async with self._http.request(method, url + path, json=body, timeout=timeout) as answer:
                status, content = answer.status, await answer.read()
        except TimeoutError as error:
            raise ServerFault(f"{url}{path}: no answer in {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            refused = isinstance(error, aiohttp.ClientOSError) and error.errno == errno.ECONNREFUSED
            raise (NoServer if refused else ServerFault)(f"{url}{path}: {_cause(error)}") from error
        if 400 <= status < 500 and status not in (408, 429):
            raise Refused(f"{url}{path} refused the request ({status}): {_text(content, 2000)}")
        if status not in (200, 202):
            raise ServerFault(f"{url}{path} answered {status}: {_text(content, 500)}")
        if path.startswith(TEXT_ANSWERS):
            return None
        try:
            decoded = json.loads(content)
        except ValueError as error:
            raise ServerFault(f"{url}{path} answered what is not JSON: {content[:200]!r}") from error
        if path in CONFIRMED and not (isinstance(decoded, dict) and decoded.get("success") is True):
            raise ServerFault(f"{url}{path} answered garbage, and no success: {content[:200]!r}")
        return decoded

    async def healthy(self, url: str, timeout_s: float) -> bool:
        """Whether the server (or the router) says that it is ready."""
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def info(self, url: str, timeout_s: float = 30.0) -> ServerInfo:
        """Tensor parallelism, weight version and model."""
        answer = await self.call(url, "/server_info", None, timeout_s)
        model = await self.call(url, "/model_info", None, timeout_s)
        try:
            return ServerInfo(
                int(answer["tp_size"]),
                str(model["weight_version"]),
                tuple(model.get("architectures") or ()),
                str(answer.get("dtype") or "auto"),
                str(model.get("model_path") or ""),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerFault(
                f"{url}/server_info lacks tp_size or weight_version: {str(answer)[:200]}"
            ) from error

    async def weight_version(self, url: str, timeout_s: float) -> str:
        """The name of the weights that a server says it holds."""
        answer = await self.call(url, "/model_info", None, timeout_s)
        try:
            return str(answer["weight_version"])
        except (KeyError, TypeError) as error:
            raise ServerFault(f"{url}/model_info lacks weight_version: {str(answer)[:200]}") from error

    async def generate(
        self, url: str, prompt_ids: Sequence[int], params: SamplingParams, max_new_tokens: int, rid: str
    ) -> Sample:
        """Sample one completion of at most `max_new_tokens`. `rid` names the request for `abort`."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "stop_token_ids": list(params.stop_token_ids) or None,
        }
        body = {
            "rid": rid,
            "input_ids": list(prompt_ids),
            "sampling_params": sampling,
            "return_logprob": True,
        }
        answer = await self.call(url, "/generate", body, self.request_timeout_s)
        try:
            return _sample(answer)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerFault(f"{url}/generate answered garbage ({error!r}): {str(answer)[:300]}") from error

    async def score(
        self, url: str, prompt_ids: Sequence[int], token_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """Natural-log probabilities [L] of `token_ids` after `prompt_ids`, at temperature 1."""
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": [*map(int, prompt_ids), *map(int, token_ids)],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(prompt_ids) - 1,
        }
        answer = await self.call(url, "/generate", body, self.request_timeout_s)
        try:
            entries = answer["meta_info"]["input_token_logprobs"][1:]
            if [entry[1] for entry in entries] != list(token_ids):
                raise ValueError("scored other tokens than it was given")
            return np.array([entry[0] for entry in entries], np.float32)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerFault(f"{url}/generate answered garbage ({error!r}): {str(answer)[:300]}") from error

    async def abort(self, url: str, rid: str | None, timeout_s: float = 10.0) -> None:
        """Abort one request, or with None all. Its /generate answers at once, with the tokens so far."""
        await self.call(url, "/abort_request", {"rid": rid} if rid else {"abort_all": True}, timeout_s)

    async def router_workers(self, url: str) -> dict[str, str]:
        """The servers that a router sends requests to: its names of them, by URL."""
        answer = await self.call(url, "/workers", None, ROUTER_S)
        try:
            return {str(worker["url"]): str(worker["id"]) for worker in answer["workers"]}
        except (KeyError, TypeError) as error:
            raise ServerFault(f"{url}/workers answered garbage: {str(answer)[:200]}") from error

    async def add_worker(self, url: str, worker: str) -> None:
        """Tell a router of a server; it shows it when it has found it well."""
        key = {"api_key": self._key} if self._key else {}
        await self.call(url, "/workers", {"url": worker} | key, ROUTER_S)

    async def remove_worker(self, url: str, identity: str) -> None:
        """A router sends it no more requests; those that it has go on."""
        await self.call(url, f"/workers/{identity}", None, ROUTER_S, "DELETE")

    async def release_memory(self, url: str, parts: Sequence[str], timeout_s: float) -> None:
        """Let an idle server give up parts of its memory ("weights", "kv_cache") that it holds. Their content is lost.

        A server that is not idle, or does not hold them, ends.
        """
        await self.call(url, "/release_memory_occupation", {"tags": list(parts)}, timeout_s)

    async def resume_memory(self, url: str, parts: Sequence[str], timeout_s: float) -> None:
        """Let a server take parts of its memory again that it has given up; one that has them ends."""
        await self.call(url, "/resume_memory_occupation", {"tags": list(parts)}, timeout_s)


def _cause(error: aiohttp.ClientError) -> str:
    """What the system says where there was no connection ("connection refused"); aiohttp's text has not always that."""
    if isinstance(error, aiohttp.ClientOSError) and error.errno:
        return f"{os.strerror(error.errno).lower()} ({error})"
    return f"{type(error).__name__}: {error}"


def _text(content: bytes, limit: int) -> str:
    return content[: 4 * limit].decode(errors="replace")[:limit]


def _sample(answer: Any) -> Sample:
    meta = answer["meta_info"]
    entries = meta["output_token_logprobs"]
    token_ids = [entry[1] for entry in entries]
    if token_ids != answer["output_ids"]:
        raise ValueError("output_ids and output_token_logprobs disagree")
    logprobs = np.array([entry[0] for entry in entries], np.float32)
    if not np.isfinite(logprobs).all():
        raise ValueError("a logprob is not finite")
    spans = meta.get("weight_versions") or [
        {"version": meta["weight_version"], "start": 0, "end": len(entries)}
    ]
    versions = [str(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    if len(versions) != len(token_ids):
        raise ValueError("weight_versions do not cover the tokens")
    return Sample(
        np.array(token_ids, np.int32),
        logprobs,
        tuple(versions),
        FINISH_REASONS[meta["finish_reason"]["type"]],
        str(meta["weight_version"]),
    )
