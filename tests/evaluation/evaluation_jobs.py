"""Evaluations for the rank pool."""

from pathlib import Path
from typing import Any

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation import offline
from gtpo_megatron.evaluation.suites import resolve_suites


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
