"""Faults injected for real: signals to servers, and a proxy that hangs, cuts, delays, answers 500 or garbage."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import PreTrainedModel

from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import Group, PromptRequest, SamplingParams
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.client import Client
from tests.sglang.conftest import IMPATIENT, MakeEngine, Servers, logprobs_of, perturb, weights_of
from tests.sglang.proxy import FaultyProxy

pytestmark = pytest.mark.sglang


class Sampling:
    """A generate call in the background, under way when the constructor returns."""

    def __init__(self, engine: SGLangEngine, groups: int, tokens: int, *, alike: bool = True) -> None:
        """`alike`: prompts that begin alike, which a router sends to one server."""
        first = [5] * groups if alike else range(20, 20 + groups)
        self.requests = [PromptRequest(i, (first[i], 6, 7 + i), 0) for i in range(groups)]
        self.groups: list[Group] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(engine, tokens))
        self._thread.start()
        time.sleep(0.7)

    def _run(self, engine: SGLangEngine, tokens: int) -> None:
        try:
            self.groups.extend(engine.generate(self.requests, SamplingParams(2, tokens)))
        except UserError as error:
            self.error = error

    def finish(self, model: PreTrainedModel, timeout_s: float = 150.0) -> None:
        """Every group answered once, by the current weights."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        assert self.error is None
        assert sorted(g.request.group for g in self.groups) == list(range(len(self.requests)))
        for group in self.groups:
            assert len(group.completions) == 2
            for completion in group.completions:
                assert completion.finish_reason in ("stop", "length")
                ours = logprobs_of(model, group.request.prompt_ids, completion.token_ids)
                np.testing.assert_allclose(completion.logprobs, ours, atol=2e-4)

    def wait(self) -> UserError | None:
        """The error that it ended with."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.error is None or isinstance(self.error, UserError)
        return self.error


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("fault", ["hang", "cut", "error", "garbage", "slow"])
def test_requests_of_a_server_that_fails_are_answered_by_the_other(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy, fault: str
) -> None:
    engine = make_engine(
        urls=(proxy.url, servers.urls[1]), request_timeout_s=3.0 if fault == "hang" else 60.0
    )
    engine.update_weights(weights_of(model), 0)
    proxy.faults = {"/generate": fault}
    sampling = Sampling(engine, groups=6, tokens=12)
    sampling.finish(model)
    assert proxy.seen
    proxy.faults = {}
    until(lambda: engine.status()[proxy.url] == "ready")
    Sampling(engine, groups=3, tokens=12).finish(model)


@pytest.mark.soak
def test_a_network_cut_of_30_s_is_survived_and_the_server_taken_back(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy
) -> None:
    engine = make_engine(urls=(proxy.url, servers.urls[1]))
    engine.update_weights(weights_of(model), 0)
    sampling = Sampling(engine, groups=4, tokens=400)
    proxy.faults = {"/": "cut"}
    cut = time.monotonic()
    sampling.finish(model)
    Sampling(engine, groups=4, tokens=12).finish(model)
    until(lambda: engine.status()[proxy.url] == "down")
    perturb(model, 1)
    engine.update_weights(weights_of(model), 1)  # which the cut-off server misses
    time.sleep(cut + 30 - time.monotonic())
    assert engine.status() == {proxy.url: "down", servers.urls[1]: "ready"}
    proxy.faults = {}
    until(lambda: engine.status()[proxy.url] == "ready")
    Sampling(engine, groups=6, tokens=12).finish(model)
    engine.verify_weights(weights_of(model))


@pytest.mark.soak
def test_a_network_cut_of_30_s_to_all_servers_is_waited_out(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy
) -> None:
    engine = make_engine(urls=(proxy.url,))
    engine.update_weights(weights_of(model), 0)
    sampling = Sampling(engine, groups=4, tokens=400)
    proxy.faults = {"/": "cut"}
    cut = time.monotonic()
    threading.Timer(30.0, proxy.faults.clear).start()
    sampling.finish(model)
    assert time.monotonic() - cut > 30
    assert "/generate" in proxy.seen


@pytest.mark.soak
def test_a_stopped_server_is_left_and_taken_back(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    engine = make_engine(request_timeout_s=300.0)
    engine.update_weights(weights_of(model), 0)
    group = os.getpgid(servers.processes[0].popen.pid)
    try:
        sampling = Sampling(engine, groups=4, tokens=400)
        os.killpg(group, signal.SIGSTOP)
        sampling.finish(model)
        assert engine.status()[servers.urls[0]] == "down"
    finally:
        os.killpg(group, signal.SIGCONT)
    until(lambda: engine.status()[servers.urls[0]] == "ready")


@pytest.mark.parametrize(
    "path", ["/update_weights_from_distributed", "/begin_weight_update", "/continue_generation"]
)
def test_a_transfer_that_breaks_off_is_repeated(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy, path: str
) -> None:
    engine = make_engine(urls=(proxy.url, servers.urls[1]))
    engine.update_weights(weights_of(model), 0)
    perturb(model, 1)
    proxy.faults = {path: "error"}
    threading.Timer(3.0, proxy.faults.clear).start()
    engine.update_weights(weights_of(model), 1)
    until(lambda: set(engine.status().values()) == {"ready"})
    assert path in proxy.seen
    Sampling(engine, groups=6, tokens=12).finish(model)
    engine.verify_weights(weights_of(model))


@pytest.mark.parametrize("others", [True, False])
def test_a_server_that_fails_while_it_is_asked_is_asked_again(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy, others: bool
) -> None:
    urls = (proxy.url, servers.urls[1]) if others else (proxy.url,)
    engine = make_engine(urls=urls)
    perturb(model, 1)
    engine.update_weights(weights_of(model), 0)
    for path in ("/weights_checker", "/update_weights_from_disk", "/generate"):
        proxy.seen.clear()
        proxy.faults = {path: "cut"}
        threading.Timer(1.0, proxy.faults.clear).start()
        if path == "/generate":
            scores = engine.score([((5, 6, 7), (8, 9))])
            assert set(scores) == set(urls)
            for score in scores.values():
                ours = logprobs_of(model, (5, 6, 7), np.array([8, 9], np.int32))
                np.testing.assert_allclose(score[0], ours, atol=2e-4)
        else:
            engine.verify_weights(weights_of(model))
        assert path in proxy.seen
        assert set(engine.status().values()) == {"ready"}


@pytest.mark.parametrize("hanging", ["/pause_generation", "/"])
@pytest.mark.soak
def test_a_server_that_hangs_in_an_update_is_left_out(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy, hanging: str
) -> None:
    quick = replace(IMPATIENT, control_s=2.0, health_timeout_s=2.0)
    engine = make_engine(quick, urls=(proxy.url, servers.urls[1]))
    engine.update_weights(weights_of(model), 0)
    perturb(model, 1)
    proxy.faults = {hanging: "hang"}  # nothing ends it before the update has
    engine.update_weights(weights_of(model), 1)
    assert engine.status()[servers.urls[1]] == "ready"
    assert engine.status()[proxy.url] != "ready"
    assert "/pause_generation" in proxy.seen
    proxy.faults = {}
    until(lambda: set(engine.status().values()) == {"ready"})
    Sampling(engine, groups=6, tokens=12).finish(model)
    engine.verify_weights(weights_of(model))


def test_a_server_that_hangs_while_it_is_asked_is_left_out(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy
) -> None:
    engine = make_engine(replace(IMPATIENT, health_timeout_s=2.0), urls=(proxy.url, servers.urls[1]))
    engine.update_weights(weights_of(model), 0)
    proxy.faults = {"/": "hang"}
    assert list(engine.score([((5, 6, 7), (8, 9))])) == [servers.urls[1]]
    assert "/generate" in proxy.seen
    assert engine.status()[proxy.url] == "down"


def test_a_server_that_hangs_does_not_hold_up_the_return_of_another(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy
) -> None:
    patient = replace(IMPATIENT, health_timeout_s=2.0, transfer_s=600.0)
    engine = make_engine(patient, urls=(proxy.url, servers.urls[1]))
    engine.update_weights(weights_of(model), 0)
    proxy.faults = {"/weights_checker": "hang"}
    other = {"new_version": "another run's", "abort_all_requests": False}
    httpx.post(f"{servers.urls[1]}/update_weight_version", json=other, timeout=30).raise_for_status()
    until(
        lambda: "/weights_checker" in proxy.seen
    )  # the other's weights are compared with those of the first
    assert engine.status()[servers.urls[1]] == "stale"
    proxy.faults = {"/": "hang"}
    until(lambda: engine.status() == {proxy.url: "down", servers.urls[1]: "ready"})
    Sampling(engine, groups=3, tokens=12).finish(model)


def test_a_server_that_fails_whenever_it_is_asked_stops_the_run(
    make_engine: MakeEngine, model: PreTrainedModel, servers: Servers, proxy: FaultyProxy
) -> None:
    engine = make_engine(urls=(proxy.url,))
    engine.update_weights(weights_of(model), 0)
    proxy.faults = {"/weights_checker": "error"}
    with pytest.raises(UserError, match=r"failed 6 times(.|\n)*/weights_checker answered 500"):
        engine.verify_weights(weights_of(model))
    proxy.faults = {}
    engine.verify_weights(weights_of(model))


@pytest.mark.soak
def test_without_any_server_the_run_waits_and_then_stops_with_a_message(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, proxy: FaultyProxy
) -> None:
    engine = make_engine(urls=(proxy.url,), no_server_timeout_s=6.0)
    engine.update_weights(weights_of(model), 0)
    proxy.faults = {"/": "cut"}
    error = Sampling(engine, groups=2, tokens=12).wait()
    assert "no SGLang server has been usable for 6 s" in str(error)
    assert proxy.url in str(error)
    with pytest.raises(UserError, match="no SGLang server"):
        engine.update_weights(weights_of(model), 1)
    proxy.faults = {}
    until(lambda: set(engine.status().values()) == {"ready"})
    Sampling(engine, groups=2, tokens=12).finish(model)


def test_the_file_of_urls_is_followed(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, tmp_path: Path
) -> None:
    urls = tmp_path / "urls.txt"
    urls.write_text(f"# servers\n{servers.urls[0]}\n")
    engine = make_engine(urls_file=str(urls))
    engine.update_weights(weights_of(model), 0)
    assert list(engine.status()) == servers.urls[:1]
    urls.write_text("not a url\n")
    time.sleep(1.5)
    assert list(engine.status()) == servers.urls[:1]
    urls.write_text(f"{servers.urls[1]}/\n")
    until(lambda: engine.status() == {servers.urls[1]: "ready"})
    Sampling(engine, groups=4, tokens=12).finish(model)


@pytest.mark.soak
def test_generation_goes_through_the_router_and_survives_its_death(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel
) -> None:
    engine = make_engine(router=True)
    engine.update_weights(weights_of(model), 0)
    until(lambda: engine.router_url is not None, 120)
    first = engine.router_url
    Sampling(engine, groups=6, tokens=12).finish(model)
    sampling = Sampling(engine, groups=6, tokens=300)
    assert engine.router_pid is not None
    os.killpg(engine.router_pid, signal.SIGKILL)
    sampling.finish(model)
    until(lambda: engine.router_url not in (None, first), 120)
    perturb(model, 1)
    engine.update_weights(weights_of(model), 1)
    Sampling(engine, groups=6, tokens=12).finish(model)


@pytest.mark.soak
def test_a_server_that_dies_behind_a_router_costs_its_own_requests_alone(
    make_engine: MakeEngine, servers: Servers, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    generate = Client.generate

    async def counted(self: Client, *args: Any) -> Any:
        sent.append(args[-1])
        return await generate(self, *args)

    monkeypatch.setattr(Client, "generate", counted)
    engine = make_engine(router=True)
    engine.update_weights(weights_of(model), 0)
    until(lambda: engine.router_url is not None, 120)
    before = engine.router_url
    until(lambda: len(httpx.get(f"{before}/workers").json()["workers"]) == 2)
    sampling = Sampling(engine, groups=6, tokens=600, alike=False)
    loads = {w["url"]: w["load"] for w in httpx.get(f"{before}/workers").json()["workers"]}
    assert len(sent) == 12 and min(loads.values()) > 0
    servers.processes[0].end()
    sampling.finish(model)
    assert len(sent) <= 12 + loads[servers.urls[0]]
    assert engine.router_url == before
