"""Suites: a set by name or file, local folders in the place of hub names, and what a suite says of sampling."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gtpo_megatron.config import DataConfig, EvaluationConfig, FieldMap, RunConfig, SuiteConfig
from gtpo_megatron.config.loading import YAML_SUFFIXES, load_file
from gtpo_megatron.data.rows import read_rows
from gtpo_megatron.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "eval"
DATA = "data"  # the suite that evaluation.data is
_KEY = re.compile(r"(?<![\w./])data\.(path|few_shot|max_prompt_tokens|bad_rows|chat|system_prompt)\b")
_ASKED_BY = "evaluation.suites (--suite)"


@dataclass(frozen=True)
class Suite:
    """A set to evaluate on. `config` is the run's, with the suite's data and sampling in its section `evaluation`."""

    name: str
    config: RunConfig

    @property
    def title(self) -> str:
        """What a message calls it."""
        return "evaluation.data" if self.name == DATA else f"suite {self.name}"

    @property
    def keys(self) -> str:
        """What a message calls the keys of its data: evaluation.data.path, suite gsm8k: path."""
        return "evaluation.data." if self.name == DATA else f"suite {self.name}: "

    @property
    def data(self) -> DataConfig:
        """The suite's prompts."""
        assert self.config.evaluation.data is not None
        return self.config.evaluation.data


@contextmanager
def naming(keys: str) -> Iterator[None]:
    """Errors of reading a set inside, which speak of data.path and so on, speak of `<keys>path`."""
    try:
        yield
    except UserError as error:
        raise UserError(_KEY.sub(lambda match: keys + match[1], str(error))) from error


def metrics_of(suite: str) -> str:
    """What the names of a suite's metrics in training begin with."""
    return "eval/" if suite == DATA else f"eval/{suite}/"


def resolve_suites(config: RunConfig, names: Sequence[str] = ()) -> list[Suite]:
    """What `gtpo-megatron evaluate` is about: the suites named here, or in evaluation.suites, or evaluation.data alone.

    Each set is looked at, none is read whole.

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
        suite = Suite(DATA, config)
        _first_row(suite)
        return [suite]
    return [_looked_at(config, suite) for suite in _files(names)]


def suites_in_training(config: RunConfig, *, look: bool = True) -> list[Suite]:
    """What a run is evaluated on: evaluation.data, as suite `data`, and evaluation.suites.

    Each set of a suite is looked at; without `look` none is, and which of its columns a suite reads stays open.

    Raises:
        UserError: as `resolve_suites`, but that nothing to evaluate on is no mistake.
    """
    own = [Suite(DATA, config)] if config.evaluation.data is not None else []
    resolve = _looked_at if look else _unread
    return own + [resolve(config, suite) for suite in _files(config.evaluation.suites, bool(own))]


def _files(names: Sequence[str], beside_data: bool = False) -> list[SuiteConfig]:
    files = [load_file(_file(name), SuiteConfig) for name in names]
    taken = [DATA] if beside_data else []
    for suite in files:
        if suite.name in taken:
            whose = " (evaluation.data is one)" if beside_data and suite.name == DATA else ""
            raise UserError(
                f"{_ASKED_BY}: two suites are named {suite.name}{whose}; give each a name of its own"
            )
        taken.append(suite.name)
    return files


def _file(name: str) -> Path:
    if name.endswith(YAML_SUFFIXES):
        return Path(name)
    folders = [Path("recipes/eval"), SHIPPED]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UserError(
        f"{_ASKED_BY}: {name}: no such suite; known: {', '.join(known) or 'none (run in the repository)'}. "
        "A suite of your own is a file: my.yaml"
    )


def _looked_at(config: RunConfig, suite: SuiteConfig) -> Suite:
    """The suite, reading the columns that its set has."""
    unread = _unread(config, suite)
    columns = _first_row(unread)
    data = unread.data.model_copy(update={"fields": _fields(suite, columns)})
    evaluation = unread.config.evaluation.model_copy(update={"data": data})
    return Suite(suite.name, config.model_copy(update={"evaluation": evaluation}))


def _unread(config: RunConfig, suite: SuiteConfig) -> Suite:
    return Suite(suite.name, _with_suite(config, suite))


def _with_suite(config: RunConfig, suite: SuiteConfig) -> RunConfig:
    """The run's configuration with the suite as the one thing that its section `evaluation` is about."""
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
    own = {
        name: getattr(suite, name)
        for name in ("samples", "temperature", "top_p", "max_new_tokens", "seed")
        if getattr(suite, name) is not None
    }
    own |= {"data": data.model_dump(), "suites": (), "folder": None}
    values = config.evaluation.model_dump() | own
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


def _first_row(suite: Suite) -> dict[str, object]:
    with naming(suite.keys):
        for _, row in read_rows(suite.data.model_copy(update={"limit": None})):
            if row is not None:
                return row
    raise UserError(f"{suite.title}: {suite.data.path} (split {suite.data.split}) has no rows")


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
