"""Evaluations for the rank pool."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.data.suites import resolve_suites
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation import engines, offline
from gtpo_megatron.policy.exchange.convert import hf_to_megatron, start_ranks
from gtpo_megatron.rollout.embedded import EmbeddedEngine
from gtpo_megatron.rollout.protocol import Group, PromptRequest, SamplingParams


def evaluate(config: RunConfig, output: Path) -> dict[str, Any] | str:
    """The results, or the message of the error that ended the evaluation."""
    try:
        return offline.evaluate_suites(config, resolve_suites(config), output)[1]
    except UserError as error:
        return str(error)


def evaluate_twice(config: RunConfig, first: Path, second: Path) -> tuple[Any, Any]:
    """The results of two evaluations that share nothing but the seed."""
    return evaluate(config, first), evaluate(config, second)


def evaluate_interrupted(config: RunConfig, output: Path) -> dict[str, Any] | str:
    """As `evaluate`, but cut after the first part."""

    def cut(line: str) -> None:
        raise UserError("cut")

    try:
        return offline.evaluate_suites(config, resolve_suites(config), output, cut)[1]
    except UserError as error:
        return str(error)


class _Server:
    """Stands for servers, which rank 0 alone asks: the embedded engine, which fails for good after some groups."""

    on_every_rank = False

    def __init__(self, engine: EmbeddedEngine, groups: int) -> None:
        self.engine, self.groups = engine, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Sequence[PromptRequest], params: SamplingParams) -> Iterator[Group]:
        yield from islice(self.engine.generate(requests, params), self.groups)
        raise UserError("no server is left")


def evaluate_by_servers_that_die(config: RunConfig, output: Path, groups: int) -> dict[str, Any] | str:
    """As `evaluate`, by servers that are gone after so many groups."""
    start = engines._engine
    with patch.object(engines, "_engine", lambda *arguments: _Server(start(*arguments), groups)):
        return evaluate(config, output)


def evaluate_noting(config: RunConfig, output: Path, seen: Path) -> list[str]:
    """What an evaluation says of its progress. The file `seen` appears with the first line of a part under way."""
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        if line.endswith(" s)") and "prompts" in line:
            seen.touch()

    offline.evaluate_suites(config, resolve_suites(config), output, note, every_s=0.05)
    return lines


def write_checkpoint(source: Path, checkpoint: Path) -> None:
    """The weights of a Hugging Face directory as a Megatron checkpoint."""
    parallel = ParallelConfig()
    start_ranks(parallel)
    hf_to_megatron(source, checkpoint, parallel, "fp32", logits=False)
