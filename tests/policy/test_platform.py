"""Which layers are built, and what is set before they are."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from gtpo_megatron.config import ModelConfig, ParallelConfig, TrainingConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.machine import probe
from gtpo_megatron.policy import platform
from tests.parallel.pool import imported_context

platform.install()

from gtpo_megatron.policy import model as model_module  # noqa: E402

WHOLE, NOTHING = (True, True, True), (False, False, False)
META_ALONE, NO_EXTENSION = (True, False, False), (True, True, False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these parts of Transformer Engine, with or without CUDA."""

    def make(parts: tuple[bool, bool, bool], cuda: bool) -> None:
        monkeypatch.setattr(probe, "transformer_engine_parts", lambda: parts)
        monkeypatch.setattr(platform, "HAS_CUDA", cuda)

    return make


@pytest.mark.parametrize(
    ("parts", "cuda", "wanted", "chosen", "said"),
    [
        (WHOLE, True, "auto", True, "auto takes Transformer Engine's layers"),
        (WHOLE, True, "transformer_engine", True, "(asked for)"),
        (WHOLE, True, "local", False, "local takes the local layers (asked for)"),
        (WHOLE, False, "auto", False, "there is no CUDA GPU"),
        (NOTHING, True, "auto", False, "takes the local layers (Transformer Engine: it is not installed)"),
        (NO_EXTENSION, True, "auto", False, "without its PyTorch extension"),
    ],
)
def test_the_choice_of_layers_and_its_reason_are_logged(
    machine: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    parts: tuple[bool, bool, bool],
    cuda: bool,
    wanted: str,
    chosen: bool,
    said: str,
) -> None:
    machine(parts, cuda)
    with caplog.at_level(logging.INFO, "gtpo_megatron"):
        assert platform.use_transformer_engine(wanted) is chosen
    assert said in caplog.text


@pytest.mark.parametrize(("parts", "cuda"), [(NOTHING, True), (NO_EXTENSION, True), (WHOLE, False)])
def test_layers_that_cannot_be_used_are_refused(
    machine: Callable[..., None], parts: tuple[bool, bool, bool], cuda: bool
) -> None:
    machine(parts, cuda)
    with pytest.raises(UserError, match=r"model\.layers: transformer_engine needs"):
        platform.use_transformer_engine("transformer_engine")


@pytest.mark.parametrize(
    ("parts", "versions"), [(META_ALONE, ()), (NO_EXTENSION, ()), (WHOLE, ("2.19.0", "2.20.2"))]
)
def test_a_transformer_engine_that_cannot_be_imported_is_refused_before_megatron_is(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[bool, bool, bool],
    versions: tuple[str, ...],
) -> None:
    machine(parts, True)
    monkeypatch.setattr(probe, "transformer_engine_versions", lambda: dict(enumerate(versions)))
    monkeypatch.setattr(platform, "_installed", False)
    for _ in range(2):  # it is no better the second time
        with pytest.raises(UserError, match=r"pip uninstall transformer-engine; or, for GPUs, pip install"):
            platform.install()


def modules() -> set[str]:
    """What this process has imported."""
    return set(sys.modules)


def test_without_cuda_a_rank_starts_without_the_compiler() -> None:
    with ProcessPoolExecutor(1, mp_context=imported_context()) as pool:
        found = pool.submit(modules).result()
    assert {"gtpo_megatron.train", "megatron.core.fusions.fused_bias_swiglu"} <= found
    assert platform.HAS_CUDA or "torch._inductor.compile_fx" not in found


@pytest.mark.parametrize(("deterministic", "value"), [(True, "0"), (False, "1")])
def test_deterministic_kernels_are_asked_for_before_transformer_engines_layers_are_built(
    machine: Callable[..., None],
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    deterministic: bool,
    value: str,
) -> None:
    class Built(Exception):
        """Where Megatron-Core would look at the environment."""

    def finalize() -> None:
        raise Built(os.environ[platform.DETERMINISM])

    bridge = SimpleNamespace(
        to_megatron_provider=lambda load_weights: SimpleNamespace(vocab_size=320, finalize=finalize)
    )
    monkeypatch.setattr(
        model_module, "AutoBridge", SimpleNamespace(from_hf_pretrained=lambda *a, **k: bridge)
    )
    monkeypatch.setenv(platform.DETERMINISM, "1")
    machine(WHOLE, True)
    training = TrainingConfig(steps=1, deterministic=deterministic)
    with caplog.at_level(logging.INFO, "gtpo_megatron"), pytest.raises(Built, match=value):
        model_module.build_policy(ModelConfig(path=str(tiny_checkpoint("llama"))), ParallelConfig(), training)
    assert (f"sets {platform.DETERMINISM}=0 (before: 1)" in caplog.text) == deterministic


def test_a_port_that_another_program_has_is_a_mistake() -> None:
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        text = "from gtpo_megatron.policy import platform; platform.init_process_group()"
        done = subprocess.run(
            [sys.executable, "-c", text], env=os.environ | world, capture_output=True, text=True
        )
    assert f"UserError: MASTER_PORT={port}: another program on this machine listens" in done.stderr
