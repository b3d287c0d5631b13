"""Rules on evaluation in training: suites that are not there, lengths, and settings without effect. No set is looked at."""

from collections.abc import Iterator

from gtpo_megatron.config import RunConfig
from gtpo_megatron.data.rows import resolve_source
from gtpo_megatron.data.suites import Suite, naming, suites_in_training
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.layout import HFShape


def evaluation_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with evaluation.suites, and settings of evaluation that would silently have no effect."""
    evaluation = config.evaluation
    suites, problem = _suites(config)
    if problem is not None:
        yield problem
    for suite in suites:
        try:
            with naming(suite.keys):
                resolve_source(suite.data)
        except UserError as error:
            yield str(error)
    if evaluation.every and evaluation.data is None and not evaluation.suites:
        yield (
            f"evaluation.every: {evaluation.every} has no effect without evaluation.data or evaluation.suites; "
            "name one, or set it to 0"
        )
    if evaluation.folder is not None and not evaluation.suites:
        yield f"evaluation.folder: {evaluation.folder} has no effect without evaluation.suites; drop it"
    if evaluation.endpoint.url is not None:
        yield (
            f"evaluation.endpoint.url: {evaluation.endpoint.url} has no effect in training, which samples with its own "
            "weights; it is for `gtpo-megatron evaluate`"
        )


def evaluation_length_problems(config: RunConfig, shape: HFShape) -> Iterator[str]:
    """Held-out prompts and completions that do not fit the model's positions."""
    for suite in _suites(config)[0]:
        asked = suite.data.max_prompt_tokens
        new = suite.config.evaluation.max_new_tokens or config.rollout.max_new_tokens
        if asked + new > shape.max_positions:
            yield (
                f"{suite.keys}max_prompt_tokens + new tokens = {asked} + {new}: "
                f"above the model's {shape.max_positions} positions (max_position_embeddings)"
            )


def _suites(config: RunConfig) -> tuple[list[Suite], str | None]:
    """What the run is evaluated on, or what is wrong with it."""
    try:
        return suites_in_training(config, look=False), None
    except UserError as error:
        return [], str(error)
