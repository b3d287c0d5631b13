"""Sampling from any OpenAI-compatible server: text alone, without token ids or logprobs."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gtpo_megatron.config import EndpointConfig
from gtpo_megatron.data.prompts import Question
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import SamplingParams
from gtpo_megatron.trajectories.record import FinishReason

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_BACKOFF_S = 0.5


class _AgainError(Exception):
    """An answer that another attempt may mend."""


@dataclass(frozen=True)
class TextCompletion:
    """One sampled text."""

    text: str
    finish_reason: FinishReason
    tokens: int | None  # that the server says it sampled
    seconds: float


class Endpoint:
    """Requests to one server, `concurrency` at a time."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises UserError for a URL that is none, or a key that the environment lacks."""
        assert config.url is not None
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"evaluation.endpoint.url: {config.url}: give a base URL such as http://127.0.0.1:8000/v1"
            )
        self._config = config
        self._url = config.url.rstrip("/") + _PATHS[config.api]
        self._headers = {"Content-Type": "application/json"}
        if config.api_key:
            self._headers["Authorization"] = f"Bearer {_key(config.api_key)}"
        # a proxy of the environment cannot reach a server of this machine
        here = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if here else None))

    def sample(
        self,
        questions: Sequence[tuple[int, Question, int]],
        params: SamplingParams,
        sampled: Callable[[int], None] = lambda group: None,
    ) -> tuple[dict[int, list[TextCompletion]], BaseException | None]:
        """`params.n` completions of each (group, question, seed); `sampled` is called with each group that is whole.

        Returns the groups that are whole, and what ended the sampling early, if something did.
        """
        error: BaseException | None = None
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint")
        futures = {
            pool.submit(self._complete, question, params, seed + index, stopped): (group, index)
            for group, question, seed in questions
            for index in range(params.n)
        }
        left = {group: params.n for group, *_ in questions}
        try:
            for future in as_completed(futures):
                future.result()
                group, _ = futures[future]
                left[group] -= 1
                if not left[group]:
                    sampled(group)
        except (UserError, KeyboardInterrupt) as caught:
            error = caught
        finally:
            stopped.set()  # no further attempts; what is under way is waited for, unless somebody is waiting
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        found: dict[int, dict[int, TextCompletion]] = {group: {} for group, *_ in questions}
        for future, (group, index) in futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                found[group][index] = future.result()
        whole = {
            group: [given[i] for i in range(params.n)]
            for group, given in found.items()
            if len(given) == params.n
        }
        return whole, error

    def _complete(
        self, question: Question, params: SamplingParams, seed: int, stopped: threading.Event
    ) -> TextCompletion:
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed % 2**31,
        }
        if self._config.api == "chat":
            body["messages"] = list(question.turns)
        else:
            body["prompt"] = question.text
        for attempt in range(1, self._config.attempts + 1):
            started = time.perf_counter()
            try:
                answer = self._call(body)
                return _read(answer, time.perf_counter() - started)
            except _AgainError as fault:
                if attempt == self._config.attempts or stopped.wait(_BACKOFF_S * 2 ** (attempt - 1)):
                    raise UserError(
                        f"evaluation.endpoint: {self._url} failed {attempt} times, at last: {fault}. What was sampled "
                        "is kept: the same command goes on from there"
                    ) from None
        raise AssertionError("unreachable")

    def _call(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        try:
            with self._opener.open(request, timeout=self._config.timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace").strip()
            if 400 <= error.code < 500 and error.code not in (408, 429):
                raise UserError(
                    f"evaluation.endpoint: {self._url} refused the request ({error.code}): {said}"
                ) from None
            raise _AgainError(f"status {error.code}: {said[:200]}") from None
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
        ) as error:  # no connection, cut short, not JSON
            raise _AgainError(f"{type(error).__name__}: {error}") from None


def _read(answer: Any, seconds: float) -> TextCompletion:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        return TextCompletion(
            str(text or ""),
            _REASONS.get(choice.get("finish_reason"), "abort"),
            None if tokens is None else int(tokens),
            seconds,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _AgainError(f"an answer without a completion ({error!r}): {str(answer)[:200]}") from None


def _key(text: str) -> str:
    if not text.startswith("env:"):
        return text
    key = os.environ.get(text.removeprefix("env:"))
    if not key:
        raise UserError(f"evaluation.endpoint.api_key: {text}: there is no such environment variable")
    return key


NO_TOKENS = np.empty(0, np.int32)
