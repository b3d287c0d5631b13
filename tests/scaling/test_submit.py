"""`submit --scaling`: a run for each number of nodes, in directories of their own, or nothing at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gtpo_megatron.cluster import submission
from gtpo_megatron.commands.cli import main
from gtpo_megatron.config.loading import load_config


@pytest.fixture
def words(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A dry run of a recipe of four prompts a step on nodes of two ranks, without a Slurm to ask."""
    monkeypatch.setattr(submission.shutil, "which", lambda name: None)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    values = {
        "name": "trial",
        "dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_checkpoint("llama")), "dtype": "fp32"},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 128},
        "training": {"steps": 6},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 64},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"gpus_per_node": 0, "ranks_per_node": 2}))
    return ["submit", str(tmp_path / "recipe.yaml"), "--site", str(tmp_path / "site.yaml"), "--dry-run"]


def runs_in(folder: Path) -> dict[str, tuple[int, str]]:
    """By name: prompts a step, and the number of nodes that is asked for."""
    found = {}
    for run in (folder / "runs").glob("*"):
        made = run / "submissions" / "1"
        text = (made / "train.sbatch").read_text()
        (nodes,) = [line for line in text.splitlines() if line.startswith("#SBATCH --nodes=")]
        found[run.name] = (load_config(made / "recipe.yaml").rollout.prompts_per_step, nodes)
    return found


@pytest.mark.parametrize(("kind", "batches"), [("strong", (4, 4, 4)), ("weak", (4, 8, 16))])
def test_a_run_for_each_number_of_nodes(
    kind: str,
    batches: tuple[int, ...],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--scaling", "1,4,2", *(["--weak"] if kind == "weak" else [])])
    assert not end.value.code
    assert runs_in(tmp_path) == {
        f"trial-{kind}-{nodes}": (batch, f"#SBATCH --nodes={nodes}")
        for nodes, batch in zip((1, 2, 4), batches, strict=True)
    }
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("at any time: gtpo-megatron scaling-report ") and last.endswith(f"trial-{kind}-4")
    reports = [path.parents[2].name for path in tmp_path.glob("runs/*/submissions/1/scaling.sbatch")]
    assert reports == [f"trial-{kind}-1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--scaling", "1,2", "--nodes", "2"], "give --nodes, or --scaling"),
        ([], "give --nodes, or --scaling"),
        (["--nodes", "2", "--weak"], "--weak with --scaling alone"),
        (["--scaling", "1,2", "--sweep"], "--scaling goes without --sweep"),
        (["--scaling", "1,two"], "--scaling 1,two: expected two or more different numbers of nodes"),
        (["--scaling", "1,16"], "for 16 nodes x 2 ranks"),  # 16 completions for 32 replicas
    ],
)
def test_what_is_no_study_queues_nothing(
    given: list[str], said: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, *given])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*"))) <= 1  # of those that were checked before
