"""Ranks whose policies are built of Transformer Engine's layers, over stand-ins."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.parallel.pool import RankPool
from tests.te import standin
from tests.tiny_models import Family, make_tiny_checkpoint

SETUP = Path(__file__).resolve().parents[2] / "tools" / "setup_te_standin.sh"


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[RankPool]:
    subprocess.run([SETUP, sys.executable], check=True)
    pool = RankPool(standin.install)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def te_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Small checkpoints of a family whose sizes FP8 can take, made once per session."""

    @cache
    def make(family: Family, layers: int = 2) -> Path:
        return make_tiny_checkpoint(
            tmp_path_factory.mktemp(f"te-{family}"),
            family,
            num_hidden_layers=layers,
            hidden_size=128,
            intermediate_size=256,
            initializer_range=0.06,
        )

    return make
