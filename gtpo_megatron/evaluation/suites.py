"""Suites: a set by name or file, local folders in the place of hub names, and what a suite says of sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gtpo_megatron.config import DataConfig, EvaluationConfig, FieldMap, RunConfig, SuiteConfig
from gtpo_megatron.config.loading import YAML_SUFFIXES, load_file
from gtpo_megatron.data.rows import read_rows
from gtpo_megatron.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "eval"


@dataclass(frozen=True)
class Suite:
    """A set to evaluate on. `config` is the run's, with the suite's data and sampling in its section `evaluation`."""

    name: str
    config: RunConfig

    @property
    def data(self) -> DataConfig:
        """The suite's prompts."""
        assert self.config.evaluation.data is not None
        return self.config.evaluation.data


def resolve_suites(config: RunConfig, names: Sequence[str] = ()) -> list[Suite]:
    """The suites named here, or in evaluation.suites, or evaluation.data alone; each set is looked at, none is read whole.

    Raises:
        UserError: an unknown name, a mistake in a suite's file, two suites of one name, a set that is not there, is empty
            or has none of the columns; or nothing to evaluate on.
    """
    names = list(names) or list(config.evaluation.suites)
    if not names:
        if config.evaluation.data is None:
            raise UserError(
                "evaluation.data is missing: say which prompts to evaluate on (--suite NAME, evaluation.suites, or "
                "evaluation.data.path=...)"
            )
        _first_row(config.evaluation.data, "evaluation.data")
        return [Suite("data", config)]
    files = [load_file(_file(name), SuiteConfig) for name in names]
    for number, suite in enumerate(files):
        if suite.name in [other.name for other in files[:number]]:
            raise UserError(f"--suite: two suites are named {suite.name}; give each a name of its own")
    return [Suite(suite.name, _with_suite(config, suite)) for suite in files]


def _file(name: str) -> Path:
    if name.endswith(YAML_SUFFIXES):
        return Path(name)
    folders = [Path("recipes/eval"), SHIPPED]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UserError(
        f"--suite {name}: no such suite; known: {', '.join(known) or 'none (run in the repository)'}. "
        "A suite of your own is a file: --suite my.yaml"
    )


def _with_suite(config: RunConfig, suite: SuiteConfig) -> RunConfig:
    base = config.evaluation.data or config.data  # the policy was trained with its way of asking
    rendering = {
        name: getattr(suite, name) if getattr(suite, name) is not None else getattr(base, name)
        for name in ("few_shot", "chat", "system_prompt", "max_prompt_tokens")
    }
    path, split = _place(config.evaluation.folder, suite)
    data = DataConfig(
        path=path,
        name=suite.config if path == suite.path else None,
        split=split,
        format=suite.format,
        limit=suite.limit,
        bad_rows=suite.bad_rows,
        shuffle=False,
        **rendering,
    )
    columns = _first_row(data, f"suite {suite.name}")
    data = data.model_copy(update={"fields": _fields(suite, columns)})
    own = {
        name: getattr(suite, name)
        for name in ("samples", "temperature", "top_p", "max_new_tokens", "seed")
        if getattr(suite, name) is not None
    }
    values = config.evaluation.model_dump() | own | {"data": data.model_dump()}
    try:
        evaluation = EvaluationConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"suite {suite.name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error
    return config.model_copy(update={"evaluation": evaluation})


def _place(folder: str | None, suite: SuiteConfig) -> tuple[str, str]:
    """Path and split of the suite's set: its own, or those of a local copy, whose file may be test.* whatever the hub says."""
    if folder is None:
        return suite.path, suite.split
    local = Path(folder).expanduser() / suite.name
    if not local.is_dir() and Path(suite.path).expanduser().exists():
        return suite.path, suite.split
    if not local.is_dir():
        raise UserError(
            f"evaluation.folder: {folder} has no folder {suite.name} for that suite; put <split>.jsonl or .parquet "
            "there, or leave evaluation.folder out"
        )
    splits = [split for split in (suite.split, "test") if any(local.glob(f"{split}.*"))]
    return str(local), splits[0] if splits else suite.split


def _first_row(data: DataConfig, whose: str) -> dict[str, object]:
    for _, row in read_rows(data.model_copy(update={"limit": None})):
        if row is not None:
            return row
    raise UserError(f"{whose}: {data.path} (split {data.split}) has no rows")


def _fields(suite: SuiteConfig, columns: dict[str, object]) -> FieldMap:
    chosen = {}
    for what in ("question", "answer"):
        options = getattr(suite, what)
        found = [column for column in options if column in columns]
        if not found and suite.format == "fields":
            raise UserError(
                f"suite {suite.name}: none of the columns {', '.join(options)} for the {what} is in its set, which has "
                f"{', '.join(columns)}; name it as {what} in the suite's file"
            )
        chosen[what] = found[0] if found else options[0]
    return FieldMap(**chosen, id=suite.id if suite.id in columns else None)
