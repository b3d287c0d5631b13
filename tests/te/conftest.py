"""Checkpoints for Transformer Engine's layers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_models import Family, make_tiny_checkpoint


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
