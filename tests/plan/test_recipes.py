"""Every recipe, and every combination with overlays that a page names, through `train --dry-run`, without weights or network."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from gtpo_megatron.commands.cli import main
from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import YAML_SUFFIXES, load_config
from gtpo_megatron.machine.probe import Machine
from gtpo_megatron.plan import checks
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.estimate import Plan, completion_lengths, make_plan
from gtpo_megatron.plan.facts import efficiency, find_gpu
from gtpo_megatron.plan.layout import rank_parameters, rank_state_bytes, smallest_world
from gtpo_megatron.plan.lora import adapter_parameters
from tests.test_docs import COMMANDS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if re.search(r"^name:.*^model:$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)
SUITES = set((ROOT / "recipes" / "eval").glob("*.yaml"))  # no part of a recipe: see tests/evaluation
OVERLAYS = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(RECIPES) - SUITES)
REAL = [path for path in RECIPES if path.parent.name in ("paper", "large")]
HERE = "SmolLM2-135M-Instruct"  # for recipes whose model is made on the user's machine


def named_combinations() -> list[tuple[str, list[str], list[str]]]:
    """(page, files, overrides) of each train or evaluate command in the pages that names a recipe in a folder of recipes/."""
    found = []
    for page, words in COMMANDS:
        files = [word for word in words if word.endswith(YAML_SUFFIXES) and "=" not in word]
        if (
            words[0] in ("train", "evaluate")
            and files
            and files[0].startswith(("recipes/paper/", "recipes/large/"))
        ):
            found.append((page, files, [word for word in words if re.match(r"[a-z_.]+=", word)]))
    return found


def dry_run(
    files: Sequence[Path], overrides: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, output and errors of `train --dry-run` on the layout's own number of ranks."""
    config = load_config(files, overrides)
    model = Path(config.model.path).name
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    here = [f"model.path={CONFIGS / (model if (CONFIGS / model).is_dir() else HERE)}", f"data.path={rows}"]
    here += ["model.tokenizer=null"] if config.model.tokenizer else []
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    ranks = re.findall(r"^# Trainer: (\d+) ranks", text, re.MULTILINE)  # an overlay's come last
    world = int(ranks[-1]) if ranks else smallest_world(config.parallel)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, files), *overrides, *here, "--dry-run", "--world-size", str(world)])
    return (stopped.value.code or 0, *capsys.readouterr())


def test_the_recipes_were_found() -> None:
    assert len(RECIPES) >= 10 and len(OVERLAYS) >= 8
    models = {Path(load_config(path).model.path).name for path in REAL}
    assert models == {path.name for path in CONFIGS.iterdir()} - {HERE}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_a_dry_run_without_weights(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dry_run([recipe], [], tmp_path, capsys)
    assert (code, err) == (0, "")
    assert "not checked: model.path" in out


@pytest.mark.parametrize(
    ("page", "files", "overrides"),
    named_combinations(),
    ids=lambda value: value if isinstance(value, str) else " ".join(Path(word).stem for word in value),
)
def test_a_combination_that_a_page_names_passes_too(
    page: str, files: list[str], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run([ROOT / file for file in files], overrides, tmp_path, capsys)[::2] == (0, ""), page


@pytest.mark.parametrize("recipe", [p for p in REAL if p.parent.name == "large"], ids=lambda path: path.stem)
def test_a_large_recipe_passes_in_fp8_on_hopper_and_nowhere_else(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [recipe, recipe.with_name("fp8.yaml")]
    for capability, wanted in (((9, 0), 0), ((8, 0), 2)):
        machine = Machine(capability, transformer_engine=True)
        monkeypatch.setattr(checks, "this_machine", lambda machine=machine: machine)
        code, _, err = dry_run(files, ["name=fp8"], tmp_path, capsys)
        assert code == wanted and ("compute capability 8.9" in err) == bool(wanted), err


def state_gib(config: RunConfig, ranks: int) -> float:
    """GiB of weights, gradients and Adam on the stage that holds most, as a page gives it."""
    shape = read_shape(str(CONFIGS / Path(config.model.path).name))
    parallel, lora = config.parallel, config.model.lora
    most = max(
        rank_state_bytes(
            rank_parameters(shape, parallel, stage),
            parallel,
            ranks,
            bf16=config.model.dtype == "bf16",
            distributed_optimizer=config.optimizer.distributed,
            adapters=adapter_parameters(shape, lora, parallel, stage) if lora else 0,
        )
        for stage in range(parallel.pipeline)
    )
    return round(most / 2**30, 1)


@pytest.mark.parametrize("recipe", REAL, ids=lambda path: path.stem)
def test_the_memory_in_a_header_is_the_planners(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    ranks = int(re.search(r"^# Trainer: (\d+) ranks", text, re.MULTILINE)[1])
    said = float(re.search(r"^# Weights, gradients and Adam: ([\d.]+) GiB a rank", text, re.MULTILINE)[1])
    assert said == state_gib(load_config(recipe), ranks)


def planned(files: Sequence[Path], gpus: int) -> tuple[RunConfig, Plan]:
    config = load_config(files)
    shape = read_shape(str(CONFIGS / Path(config.model.path).name))
    lengths = completion_lengths(config, None)
    return config, make_plan(config, shape, gpus, find_gpu("h100-sxm"), lengths, efficiency())


@pytest.mark.parametrize("recipe", REAL, ids=lambda path: path.stem)
def test_what_a_header_expects_is_the_planners(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    ranks = int(re.search(r"^# Trainer: (\d+) ranks", text, re.MULTILINE)[1])
    memory, step = re.search(
        r"^# The planner expects ([\d.]+) GiB .* ([\d.]+) s a step", text, re.MULTILINE
    ).groups()
    _, plan = planned([recipe], ranks)
    assert float(memory) == pytest.approx(plan.worst.total / 2**30, rel=0.01)
    assert float(step) == pytest.approx(plan.step.step, rel=0.05)


def test_the_cost_of_the_papers_runs_on_the_page_is_the_planners() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    number = r"([\d.]+)"
    rows = re.findall(
        rf"^\| (\S+), [^|]+ \| ([^|]*) \| {number} \| {number} \| {number} \| {number} \| {number} \|$",
        page,
        re.MULTILINE,
    )
    assert len(rows) == 12
    for name, overlays, *figures in rows:
        gpus, memory, step, steps, hours = map(float, figures)
        files = [f"{name}-bf16.yaml", "math.yaml", *re.findall(r"`(\S+)`", overlays)]
        serving = 0 if "sft.yaml" in files else 1
        config, plan = planned([ROOT / "recipes" / "paper" / file for file in files], int(gpus) - serving)
        assert (plan.servers, config.training.steps) == (serving, steps)
        assert memory == pytest.approx(plan.worst.total / 2**30, rel=0.01)
        assert step == pytest.approx(plan.step.step, rel=0.05)
        assert hours == pytest.approx(plan.step.step * steps * gpus / 3600, rel=0.05)


def test_the_memory_of_adapters_on_the_page_is_the_planners() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+), rank (\d+), (\d+) GPUs? \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for name, rank, gpus, full, lora in rows:
        files = [ROOT / "recipes" / "paper" / f"{name}-bf16.yaml", ROOT / "recipes" / "paper" / "lora.yaml"]
        layout = ["parallel.tensor=1", "parallel.sequence=false"] if gpus == "1" else []
        assert float(full) == state_gib(load_config(files[:1], layout), int(gpus))
        assert float(lora) == state_gib(load_config(files, [*layout, f"model.lora.rank={rank}"]), int(gpus))


def test_every_overlay_and_recipe_is_named_by_the_pages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("reproduce.md", "evidence.md")
    )
    assert [path.name for path in REAL if path.name not in readme] == []
    assert [path.name for path in [*REAL, *OVERLAYS] if path.name not in page] == []


def test_the_runs_of_the_paper_have_names_of_their_own() -> None:
    folder = ROOT / "recipes" / "paper"
    variants = [[], ["group-12"], ["grpo"], ["grpo-kl"], ["sft"], ["reference"]]
    sets = [[*variant, *task] for variant in variants for task in ([], ["math"])]
    runs = [
        [base, *[folder / f"{name}.yaml" for name in overlays + adam]]
        for base in REAL
        if base.parent == folder
        for overlays in sets
        for adam in ([], ["usual-adam"])
        if "sft" not in overlays or not adam  # its betas are the usual ones anyway
    ]
    names = [load_config(files).name for files in runs]
    assert len(names) == 44 and len(set(names)) == len(names)
