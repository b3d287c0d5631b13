"""Bad servers, found before a tensor is sent: another model or type of numbers; and answers that make no sense."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from benchmarks.common.receiver import BROADCAST, Receiver
from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.protocol import NamedTensor
from gtpo_megatron.rollout.sglang.client import ServerInfo
from gtpo_megatron.rollout.sglang.engine import SGLangEngine
from gtpo_megatron.rollout.sglang.servers.model import OtherModel, ServedModel
from gtpo_megatron.rollout.sglang.servers.states import Timing
from tests.sglang.scripted import TIMING, Rehearsal, in_fake_time, rehearsal

LIMIT_S = 3.0  # of a collective
QWEN = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024}


def checkpoint_of(directory: Path, **config: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN | config))
    return str(directory)


@pytest.mark.parametrize(
    ("config", "served", "wrong"),
    [
        ({}, {}, ""),
        ({}, {"architectures": (), "dtype": "auto"}, ""),  # it does not say
        ({"rope_theta": 1e6}, {}, ""),  # nothing that a tensor's shape depends on
        ({"vocab_size": 151669}, {}, "vocab_size 151669, not 151936"),
        ({"hidden_size": 2048}, {}, "hidden_size 2048, not 1024"),
        (
            {},
            {"architectures": ("LlamaForCausalLM",)},
            r"architectures \['LlamaForCausalLM'\], not \['Qwen3ForCausalLM'\]",
        ),
        ({}, {"dtype": "float16"}, "dtype float16, not bfloat16"),
    ],
)
def test_a_server_is_compared_as_far_as_it_can_be_known(
    tmp_path: Path, config: dict[str, Any], served: dict[str, Any], wrong: str
) -> None:
    policy = ServedModel.at(checkpoint_of(tmp_path / "policy"), "bfloat16")
    path = checkpoint_of(tmp_path / "server", **config)
    info = replace(ServerInfo(1, "default", ("Qwen3ForCausalLM",), "bfloat16", path), **served)
    if not wrong:
        return policy.check("http://a:1", info)
    with pytest.raises(OtherModel, match=rf"http://a:1 serves another model \({path}\) than .*: {wrong}"):
        policy.check("http://a:1", info)
    policy.check("http://a:1", replace(info, model_path="/only/there", architectures=(), dtype="auto"))


def serve_another(running: Rehearsal, url: str) -> None:
    """From now on the server of this URL says that it serves another model than the others do."""
    told = running.client.info

    async def info(asked: str, timeout_s: float = 30.0) -> ServerInfo:
        architecture = "Other" if asked == url else "Ours"
        return replace(await told(asked, timeout_s), architectures=(architecture,))

    running.client.info = info
    running.pool._supervision._model = ServedModel("ours", "bfloat16", {"architectures": ["Ours"]})


def test_a_run_ends_at_once_with_the_name_of_a_server_of_another_model() -> None:
    async def play() -> None:
        async with rehearsal(3, TIMING, updated=False) as running:
            serve_another(running, "http://given:1")
            with pytest.raises(
                UserError, match=r"http://given:1 serves another model .* \['Other'\], not \['Ours'\]"
            ):
                await running.pool.wait_started()
            assert asyncio.get_running_loop().time() < 5.0
            assert not any(
                "weight" in path for server in running.servers.values() for _, path in server.asked
            )

    in_fake_time(play())


def test_one_that_comes_during_a_run_is_left_out() -> None:
    async def play() -> None:
        async with rehearsal(3, TIMING) as running:
            serve_another(running, "http://given:1")
            running.server(1).restart()
            await running.until(lambda: running.states[1] == "down")
            await running.update()
            assert running.states == ["ready", "down", "ready"]
            assert "serves another model" in running.fleet.workers[1].reason
            assert not any("weight" in path for _, path in running.server(1).asked[-5:])

    in_fake_time(play())


class Garbling(Receiver):
    """Answers a path with what is no answer, as long as it is told to."""

    def __init__(self, path: str, answer: Callable[[], web.Response]) -> None:
        self.path, self.answer = path, answer
        self.garbles = threading.Event()
        super().__init__(limit_s=LIMIT_S)

    async def _answer(self, request: web.Request) -> web.Response:
        if self.garbles.is_set() and request.path == self.path:
            await request.read()
            return self.answer()
        return await super()._answer(request)


def weights(version: int) -> list[NamedTensor]:
    return [(f"{i}", torch.full((1000,), float(10 * version + i))) for i in range(3)]


def page() -> web.Response:
    return web.Response(text="<html>It works!</html>")


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/pause_generation", page),
        ("/init_weights_update_group", page),
        (BROADCAST, page),
        (BROADCAST, lambda: web.json_response([1, 2])),
        (BROADCAST, lambda: web.json_response({"success": False})),
        (BROADCAST, lambda: web.Response(status=502, text="Bad Gateway")),
        ("/end_weight_update", page),
        ("/model_info", lambda: web.json_response([1, 2])),
        ("/server_info", page),
    ],
)
def test_a_server_that_answers_garbage_is_left_out_until_it_does_not(
    tiny_checkpoint: Callable[[str], Path], path: str, answer: Callable[[], web.Response]
) -> None:
    checkpoint = tiny_checkpoint("qwen3")
    erring, other = Garbling(path, answer), Receiver(limit_s=LIMIT_S)
    config = SGLangConfig(urls=(erring.url, other.url))
    timing = Timing(
        collective_s=LIMIT_S, backoff_s=0.05, gather_s=0.05, health_interval_s=0.1, health_pause_s=0.05
    )
    with closing(SGLangEngine(config, str(checkpoint), "fp32", checkpoint / "logs", "cpu", timing)) as engine:
        if path == "/init_weights_update_group":
            erring.garbles.set()
        engine.update_weights(weights(0), 0)
        erring.garbles.set()
        engine.update_weights(weights(1), 1)
        assert engine.status()[other.url] == "ready"
        assert engine.status()[erring.url] != "ready"
        assert all(other.tensors[name].equal(tensor) for name, tensor in weights(1))
        erring.garbles.clear()
        until(lambda: set(engine.status().values()) == {"ready"})
        assert all(erring.tensors[name].equal(tensor) for name, tensor in weights(1))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
