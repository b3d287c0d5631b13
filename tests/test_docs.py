"""The documentation against the program: generated tables, commands, keys, paths and metrics that it names."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

from gtpo_megatron.commands.cli import app
from gtpo_megatron.config.loading import YAML_SUFFIXES, known_keys, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("recipes", "docs", "tools", "benchmarks", "tests", "requirements", "gtpo_megatron", "slurm")
MADE_LATER = ("benchmarks/results/",)  # a result may be named before the benchmark has been run here
PLACEHOLDER = re.compile(r"[A-Z]{3,}|\.\.\.|[<>*{}$]")


def code_lines(page: Path) -> Iterator[str]:
    """Lines of the page's blocks of code, fenced or indented, with continued lines joined."""
    fenced = False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def words_of_commands(page: Path) -> Iterator[list[str]]:
    """The words behind `gtpo-megatron` (or `-m gtpo_megatron`) of each command."""
    for line in code_lines(page):
        if match := re.match(
            r"(?:.venv/bin/)?gtpo-megatron\s+([a-z-].*)|.*torchrun .*-m gtpo_megatron\s+(.*)", line
        ):
            yield shlex.split(match[1] or match[2], comments=True)


COMMANDS = [(page.name, words) for page in PAGES for words in words_of_commands(page)]


def make_config_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config_docs", ROOT / "tools" / "make_config_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_keys_is_current() -> None:
    tool = make_config_docs()
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run tools/make_config_docs.py"


def test_every_key_has_a_row() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sections = {key.rpartition(".")[0].removesuffix("[]") for key in known_keys()}
    keys = {key for key in known_keys() if not key.startswith("evaluation.data.") and key not in sections}
    assert {key for key in keys if f"| `{key}` |" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {
        (page.parent / link).resolve() for link in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text)
    }
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*[\w/])", text)
    paths = {
        ROOT / name for name in named if not PLACEHOLDER.search(name) and not name.startswith(MADE_LATER)
    }
    assert sorted(str(path) for path in links | paths if not path.exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"(?:^|`|\$ )make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert named - targets == set()


def test_commands_were_found() -> None:
    assert {"train", "evaluate", "report", "doctor", "convert", "verify-resume"} <= {
        words[0] for _, words in COMMANDS
    }


@pytest.mark.parametrize(
    "page, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_command_is_known(page: str, words: list[str]) -> None:
    command = typer.main.get_command(app)
    rest = list(words)
    options = {option for parameter in command.params for option in parameter.opts}
    while hasattr(command, "commands"):
        name = next((word for word in rest if not word.startswith("-")), None)
        if name not in command.commands:
            break
        command = command.commands[name]
        rest.remove(name)
        options |= {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
    assert [word for word in rest if word.startswith("--") and word.partition("=")[0] not in options] == []
    if command.name not in ("train", "evaluate"):
        return
    overrides = [word for word in rest if re.match(r"[a-z_.\[\]0-9]+=", word)]
    keys = set(known_keys())
    unknown = {re.sub(r"\[\d+\]", "[]", word.partition("=")[0]) for word in overrides} - keys
    assert {key for key in unknown if not key.startswith("rewards.terms[].options.")} <= {"optimizer.lrr"}
    recipes = [ROOT / word for word in rest if word.endswith(YAML_SUFFIXES) and "=" not in word]
    if recipes and not unknown and not any(PLACEHOLDER.search(word) for word in rest):
        load_config(recipes, overrides)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_is_listed_and_loads(recipe: Path) -> None:
    assert recipe.name in (ROOT / "README.md").read_text(encoding="utf-8")
    assert load_config(recipe).name


def test_metrics_are_documented() -> None:
    """Names that the code spells out, in any place that makes metrics, stand in the table."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    sources = ("train.py", "run/costs.py", "trajectories/analysis.py", "evaluation/training.py")
    code = "".join((ROOT / "gtpo_megatron" / name).read_text() for name in sources)
    names = set(re.findall(r'"((?:[a-z_]+)/(?:[a-z_0-9@]+))"', code))
    assert len(names) > 25
    assert {name for name in names if f"`{name}`" not in text} == set()
