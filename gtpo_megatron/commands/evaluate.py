"""`gtpo-megatron evaluate`: arguments and printing."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gtpo_megatron.commands.arguments import Recipe, Settings
from gtpo_megatron.commands.imports import importing
from gtpo_megatron.config import RunConfig

EPILOG = (
    "Examples:\n\n"
    "gtpo-megatron evaluate RECIPE.yaml model.path=runs/x/hf evaluation.samples=8\n\n"
    "gtpo-megatron evaluate RECIPE.yaml --suite gsm8k --suite math500 model.path=runs/x/checkpoints/latest\n\n"
    "gtpo-megatron evaluate RECIPE.yaml --suite gsm8k evaluation.endpoint.url=http://127.0.0.1:8000/v1 "
    "evaluation.endpoint.model=NAME"
)


def evaluate(
    recipe: Recipe,
    settings: Settings = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a suite in recipes/eval, or a file like those; may be repeated. "
            "Default: evaluation.suites, else evaluation.data.",
            metavar="NAME|FILE.yaml",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the results. Default: one of its own in the run's directory.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score a policy (model.path: Hugging Face or training checkpoint, or an endpoint's) on suites; prints JSON.

    Sampled by rollout.engine, or by evaluation.endpoint. One that was interrupted goes on.
    """
    from gtpo_megatron.config.loading import load_recipe
    from gtpo_megatron.data.suites import resolve_suites

    config = load_recipe(recipe, settings or [])
    suites = resolve_suites(config, suite or ())
    main = int(os.environ.get("RANK", 0)) == 0

    def say(line: str) -> None:
        if main:
            typer.echo(line, err=True)

    say(scored(config))
    with importing():
        from gtpo_megatron.evaluation.offline import evaluate_suites

    directory, results = evaluate_suites(config, suites, output, say)
    if main:
        typer.echo(json.dumps(summary(directory, results), indent=2))


def scored(config: RunConfig) -> str:
    """Which policy the figures are of, and where the trained one stands if it is another."""
    endpoint = config.evaluation.endpoint
    if endpoint.url is not None:
        return f"scoring {endpoint.model} at {endpoint.url}"
    line = f"scoring model.path: {config.model.path}"
    trained = config.path / "hf"
    if trained.is_dir() and trained.resolve() != Path(config.model.path).resolve():
        line += f", which this recipe starts from; for the policy that it trained: model.path={trained}"
    return line


def summary(directory: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results without their rows, and where all of it stands."""
    suites = {
        name: {key: value for key, value in suite.items() if key != "rows"}
        for name, suite in results["suites"].items()
    }
    return {**results, "suites": suites, "output": str(directory)}
