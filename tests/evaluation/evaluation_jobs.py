"""Evaluations for the rank pool."""

from pathlib import Path
from typing import Any

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.data.suites import resolve_suites
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation import offline
from gtpo_megatron.policy.exchange.convert import hf_to_megatron, start_ranks


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
