"""An engine's wait for servers, without one."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.rollout.sglang.engine import SGLangEngine


@pytest.fixture
def engine(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Iterator[SGLangEngine]:
    """Of one server that does not answer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        config = SGLangConfig(urls=(f"http://127.0.0.1:{closed.getsockname()[1]}",), start_timeout_s=3600)
        engine = SGLangEngine(config, str(tiny_checkpoint("llama")), "fp32", tmp_path, "cpu")
        yield engine
        engine.close()


def test_it_ends_when_the_run_is_asked_to_stop(engine: SGLangEngine) -> None:
    waiting = threading.Thread(target=engine.wait_started, daemon=True)
    waiting.start()
    while engine._starting is None:
        assert waiting.is_alive()
    engine.abort_all()  # of one batch: the run goes on
    waiting.join(1.0)
    assert waiting.is_alive()
    engine.abort_all(for_good=True)
    waiting.join(60)
    assert not waiting.is_alive()


def test_it_does_not_begin_after_that(engine: SGLangEngine) -> None:
    engine.abort_all(for_good=True)
    engine.wait_started()
