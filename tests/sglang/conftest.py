"""Real SGLang servers on this machine, without a GPU: started once, given back alive after whatever a test does to them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.protocol import NamedTensor
from gtpo_megatron.rollout.sglang import SGLangEngine, Timing
from gtpo_megatron.rollout.sglang.servers.launch import Launch, Process, end_all, make_launch
from gtpo_megatron.rollout.sglang.servers.states import Worker
from tests.sglang.proxy import FaultyProxy
from tests.tiny_models import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
START_S = 400.0
IMPATIENT = Timing(
    health_interval_s=1.0,
    health_pause_s=0.3,
    health_timeout_s=8.0,
    health_failures=2,
    drain_s=20.0,
    control_s=20.0,
    transfer_s=40.0,
    backoff_s=0.2,
)


@dataclass
class Servers:
    """SGLang servers of one checkpoint, with fixed ports."""

    launch: Launch
    checkpoint: Path
    processes: list[Process] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def start(self, index: int) -> None:
        """Start server `index`, again on its old port."""
        port = int(self.urls[index].rsplit(":", 1)[1]) if index < len(self.urls) else None
        process, url = self.launch.server(index, port)
        self.processes[index : index + 1] = [process]
        self.urls[index : index + 1] = [url]

    def wait(self) -> None:
        """Wait until all are ready."""
        deadline = time.monotonic() + START_S
        for process, url in zip(self.processes, self.urls, strict=True):
            while not _healthy(url):
                assert process.alive, process.tail(40)
                assert time.monotonic() < deadline, process.tail(40)
                time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """SGLang's interpreter; the environment is made if it is missing or its pins have changed."""
    venv = ROOT / ".venv-sglang"
    made = subprocess.run(
        [ROOT / "tools" / "setup_sglang_env.sh", venv],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"SGLang's environment cannot be made here:\n{made.stderr}")  # fails in CI
    return str(venv / "bin" / "python")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with room for long completions."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def all_servers(
    sglang_python: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    with run_servers(sglang_python, checkpoint, tmp_path_factory.mktemp("sglang"), 2) as servers:
        yield servers


@contextmanager
def run_servers(
    python: str, checkpoint: Path, logs: Path, number: int = 1, tensor: int = 1
) -> Iterator[Servers]:
    """Start servers; ended with the context."""
    config = SGLangConfig(python=python, tensor=tensor, args=("--log-level-http", "info"))
    servers = Servers(make_launch(config, str(checkpoint), "fp32", "cpu", logs), checkpoint)
    for index in range(number):
        servers.start(index)
    try:
        yield servers
    finally:
        end_all(servers.processes, 3.0)


@pytest.fixture
def servers(all_servers: Servers) -> Servers:
    """Both servers, ready."""
    for index, process in enumerate(all_servers.processes):
        if not process.alive:
            all_servers.start(index)
    all_servers.wait()
    return all_servers


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    """The trainer's side: a transformers model whose state is the source of the weights."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


MakeEngine = Callable[..., SGLangEngine]


@pytest.fixture
def make_engine(servers: Servers, tmp_path: Path) -> Iterator[MakeEngine]:
    """Engines on the running servers, or on the URLs given; closed at the end."""
    engines: list[SGLangEngine] = []

    def make(timing: Timing = IMPATIENT, **config: Any) -> SGLangEngine:
        if "urls_file" not in config:
            config.setdefault("urls", tuple(servers.urls))
        config.setdefault("bucket_mb", 1)
        config.setdefault("no_server_timeout_s", 120.0)
        config.setdefault("python", servers.launch.python)
        section = SGLangConfig(**config)
        engine = SGLangEngine(section, str(servers.checkpoint), "fp32", tmp_path / "logs", "cpu", timing)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def proxy(servers: Servers) -> Iterator[FaultyProxy]:
    """Server 0 behind a proxy that misbehaves on request."""
    with FaultyProxy(servers.urls[0]) as running:
        yield running


def weights_of(model: PreTrainedModel) -> list[NamedTensor]:
    """Hugging Face names and tensors."""
    return list(model.state_dict().items())


def perturb(model: PreTrainedModel, seed: int) -> None:
    """An update: every parameter moves by about 5%."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))


def logprobs_of(
    model: PreTrainedModel,
    prompt_ids: tuple[int, ...],
    token_ids: NDArray[np.int32],
    temperature: float = 1.0,
) -> NDArray[np.float32]:
    """What the trainer's model gives the tokens, [L]."""
    sequence = torch.tensor([[*prompt_ids, *token_ids.tolist()]])
    with torch.no_grad():
        logits = model(sequence).logits[0, len(prompt_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids).long()[:, None])[:, 0].numpy()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every change of a state of a worker from here on."""
    seen: list[tuple[str, str]] = []
    move = Worker.move

    def record(self: Worker, state: str, reason: str) -> None:
        before = self.state
        move(self, state, reason)
        if before != state:
            seen.append((before, state))

    monkeypatch.setattr(Worker, "move", record)
    return seen
