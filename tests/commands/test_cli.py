"""The command line as a user meets it: exit codes, messages, dry run, torchrun's environment."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gtpo_megatron import __version__
from gtpo_megatron.commands.arguments import complete_setting
from gtpo_megatron.commands.cli import GRACE_S, app, main
from gtpo_megatron.commands.imports import importing
from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_config
from gtpo_megatron.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\n')
    values = {
        "name": "trial",
        "model": {"path": str(tiny_checkpoint("llama")), "dtype": "fp32"},
        "data": {"path": str(rows), "max_prompt_tokens": 128},
        "training": {"steps": 2},
        "rollout": {"max_new_tokens": 64},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


Run = Callable[..., tuple[int, str, str]]


def test_garbage_is_collected_again_after_an_import_whether_or_not_it_succeeds() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))


def test_train_gets_the_resolved_configuration_and_gives_the_exit_code(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    stand_in(monkeypatch, "gtpo_megatron.train", train=lambda config: seen.append(config) or 3)
    overlay = tmp_path / "site.yaml"
    overlay.write_text("training: {seed: 7}\noptimizer: {lr: 1e-3}\n")
    code, _, _ = run("train", recipe, "optimizer.lr=2e-3", overlay, "training.steps=5")
    assert code == 3
    assert (seen[0].training.steps, seen[0].training.seed, seen[0].optimizer.lr) == (5, 7, 2e-3)


def test_a_user_error_is_one_message_and_exit_code_2(run: Run, recipe: Path) -> None:
    code, out, err = run("train", recipe, "rollout.grup_size=4")
    assert code == 2 and out == ""
    assert err == (
        "gtpo-megatron: override 'rollout.grup_size=4': rollout.grup_size: unknown key (value 4); "
        "did you mean rollout.group_size?\n"
    )


def test_an_error_while_training_has_no_traceback_either(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: RunConfig) -> int:
        raise UserError("the disk is full")

    stand_in(monkeypatch, "gtpo_megatron.train", train=fail)
    assert run("train", recipe) == (2, "", "gtpo-megatron: the disk is full\n")
    monkeypatch.setenv("GTPO_TRACEBACK", "1")
    with pytest.raises(UserError, match="the disk is full"):
        main(["train", str(recipe)])


def test_another_rank_lets_rank_0_speak_first(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run("train", recipe, "zzz=1")
    assert (code, out) == (2, "") and err.startswith("gtpo-megatron: rank 1: override 'zzz=1'")
    assert waited == [GRACE_S]


def test_under_torchrun_the_message_comes_once(recipe: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "gtpo_megatron", "train", str(recipe), "zzz=1"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert answer.stderr.count("zzz: unknown key") == 1


def test_the_world_is_torchruns(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the world has 1 rank, not a multiple" in run("train", recipe, "parallel.tensor=2")[2]
    stand_in(monkeypatch, "gtpo_megatron.train", train=lambda config: 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("train", recipe, "parallel.tensor=2")[0] == 0


def test_dry_run_prints_the_configuration_and_the_layout(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "gtpo_megatron.train", train=lambda config: pytest.fail("a dry run must not train"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", recipe, "parallel.pipeline=2", "parallel.tensor=2", "--dry-run")
    assert code == 0
    assert yaml.safe_load(out[: out.index("LlamaForCausalLM:")])["parallel"]["pipeline"] == 2
    assert "188,992 parameters on 4 ranks: tensor 2 x pipeline 2 x context 1 x data 1" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "rows.jsonl"]


def test_dry_run_of_a_larger_world(run: Run, recipe: Path) -> None:
    _, out, _ = run("train", recipe, "parallel.tensor=2", "--dry-run", "--world-size", "64")
    assert "x data 32" in out and "and 32 more ranks" in out
    assert (
        "the world has 63 ranks"
        in run("train", recipe, "parallel.tensor=2", "--dry-run", "--world-size", "63")[2]
    )
    assert "--world-size is for --dry-run" in run("train", recipe, "--world-size", "64")[2]


def test_dry_run_refuses_what_a_run_would(run: Run, recipe: Path) -> None:
    code, out, err = run("train", recipe, "parallel.tensor=3", "--dry-run")
    assert (code, out) == (2, "") and "parallel.tensor: 3 does not divide the 4 attention heads" in err


def test_dry_run_needs_config_json_alone_and_names_what_it_did_not_check(
    run: Run, recipe: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    assert "not checked" not in run("train", recipe, "--dry-run")[1]
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path / "bare")
    settings = [f"model.path={tmp_path / 'bare'}", "data.path=openai/gsm8k"]
    code, out, _ = run("train", recipe, *settings, "--dry-run")
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith("not checked: ")]
    assert [line.split(":")[1].strip() for line in said] == ["model.path", "model.path", "data.path"]
    assert run("train", recipe, *settings)[0] == 2


def evaluates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What `evaluate` is asked for: the names of the suites, of each call. Nothing is sampled."""
    asked: list[list[str]] = []
    results = {"suites": {"data": {"figures": {"pass@1": {"value": 0.5}}, "rows": [{"id": "1"}]}}}

    def stand_in_for(config: RunConfig, suites: Any, output: Path | None, note: Any) -> tuple[Path, Any]:
        asked.append([suite.name for suite in suites])
        note("data: 1 of 1 prompts")
        return output or tmp_path / "made", results

    stand_in(monkeypatch, "gtpo_megatron.evaluation.offline", evaluate_suites=stand_in_for)
    return asked


def test_evaluate_prints_json(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = evaluates(monkeypatch, tmp_path)
    data = f"evaluation.data={{path: {tmp_path / 'rows.jsonl'}, max_prompt_tokens: 64}}"
    code, out, _ = run("evaluate", recipe, data, "--output", tmp_path / "mine")
    assert code == 0 and json.loads(out) == {
        "suites": {"data": {"figures": {"pass@1": {"value": 0.5}}}},
        "output": str(tmp_path / "mine"),
    }
    assert asked == [["data"]]
    assert "evaluation.data is missing" in run("evaluate", recipe)[2]


def test_evaluate_says_which_policy_it_scores(
    recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluates(monkeypatch, tmp_path)
    data = f"evaluation.data.path={tmp_path / 'rows.jsonl'}"
    model = load_config(recipe).model.path
    code, _, err = run("evaluate", recipe, data, f"dir={tmp_path}", "name=trained")
    assert code == 0
    assert err.splitlines() == [f"scoring model.path: {model}", "data: 1 of 1 prompts"]
    (tmp_path / "trained" / "hf").mkdir(parents=True)
    _, _, err = run("evaluate", recipe, data, f"dir={tmp_path}", "name=trained")
    assert (
        f"which this recipe starts from; for the policy that it trained: model.path={tmp_path / 'trained' / 'hf'}"
        in err
    )
    endpoint = ["evaluation.endpoint.url=http://127.0.0.1:1/v1", "evaluation.endpoint.model=m"]
    assert "scoring m at http://127.0.0.1:1/v1" in run("evaluate", recipe, data, *endpoint)[2]
    assert (
        "evaluation.endpoint.url and evaluation.endpoint.model go together"
        in run("evaluate", recipe, data, endpoint[0])[2]
    )


def test_suites_by_name_and_by_file(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = evaluates(monkeypatch, tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text(f"name: mine\npath: {tmp_path / 'rows.jsonl'}\n")
    (tmp_path / "aime25").mkdir()
    (tmp_path / "aime25" / "test.jsonl").write_text('{"problem": "1+1?", "expected_answer": "2"}\n')
    local = f"evaluation.folder={tmp_path}"
    assert run("evaluate", recipe, "--suite", "aime25", local)[0] == 0
    assert run("evaluate", recipe, "--suite", "aime25", "--suite", own, local)[0] == 0
    assert run("evaluate", recipe, f"evaluation.suites=[{own}]")[0] == 0
    assert asked == [["aime25"], ["aime25", "mine"], ["mine"]]


def test_report(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    stand_in(monkeypatch, "gtpo_megatron.analysis.report", write_report=seen.append)
    assert "no metrics.jsonl there" in run("report", tmp_path)[2]
    (tmp_path / "metrics.jsonl").touch()
    assert run("report", tmp_path)[0] == 0 and seen == [tmp_path]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["report", "-h"], ["doctor", "--help"]]
)
def test_help(run: Run, arguments: list[str]) -> None:
    code, out, _ = run(*arguments)
    assert code == 0 and "Usage" in out


def test_help_names_no_file_that_is_not_there() -> None:
    root = Path(__file__).parents[2]
    texts = "\n".join(_texts(typer.main.get_command(app)))
    named = set(re.findall(r"(?<![\w./])((?:recipes|docs|tools|slurm|benchmarks)/[\w./-]*\w)", texts))
    assert "recipes/quickstart.yaml" in named
    assert {path for path in named if not (root / path).exists()} == {"recipes/mine"}  # a user's own folder
    assert "training engine" not in texts  # `evaluate` names the engines by their settings


def _texts(command: Any) -> Iterator[str]:
    """Help, epilogs and options of a command and of those under it."""
    yield from (command.help or "", command.epilog or "")
    yield from (getattr(parameter, "help", None) or "" for parameter in command.params)
    for inner in getattr(command, "commands", {}).values():
        yield from _texts(inner)


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_completion_offers_dotted_keys_and_overlays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "site.yaml").touch()
    assert complete_setting("rollout.gr") == ["rollout.group_size="]
    assert complete_setting("rec") == ["recipes/"]
    assert complete_setting("recipes/s") == ["recipes/site.yaml"]


def test_help_and_configuration_errors_import_nothing_heavy(recipe: Path) -> None:
    program = (
        "import sys\nfrom gtpo_megatron.commands.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'megatron', 'datasets'} & set(sys.modules)))\n"
    )
    for arguments in (["--help"], ["train", str(recipe), "zzz=1"]):
        command = [sys.executable, "-c", program, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.stdout.splitlines()[-1] == "[]"


def test_python_dash_m(recipe: Path) -> None:
    command = [sys.executable, "-m", "gtpo_megatron", "train", str(recipe), "training.steps=none"]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"RANK": "0"}
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("gtpo-megatron: override 'training.steps=none': training.steps: 'none'")
