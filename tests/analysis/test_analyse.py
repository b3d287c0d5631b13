"""`gtpo-megatron analyse`: every format gives the same findings, and bad input is named by file and row."""

import json
from pathlib import Path

import numpy as np
import pytest

from gtpo_megatron.analysis.analyse import analyse
from gtpo_megatron.analysis.findings import diversity
from gtpo_megatron.commands.cli import main
from gtpo_megatron.errors import UserError
from gtpo_megatron.trajectories.analysis import repetition
from gtpo_megatron.trajectories.seen import Seen, write_seen
from gtpo_megatron.trajectories.store import TrajectoryStore
from tests.analysis import dumps
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", dumps.WITH_TOKENS)
def test_formats_with_token_ids(name: str, tmp_path: Path) -> None:
    figures = analyse([dumps.WITH_TOKENS[name](tmp_path / "dump")], trust=True)
    assert figures["format"] == name
    assert {key: figures[key] for key in dumps.FIGURES} == dumps.FIGURES
    assert [step["step"] for step in figures["by_step"]] == [dumps.STEP]
    assert figures["grpo_gradient"]["logit_share"] == pytest.approx(
        figures["grpo_gradient"]["coefficient_share"], rel=1e-6
    )  # all logprobs are equal here


@pytest.mark.parametrize("name", dumps.TEXTS_ALONE)
def test_formats_of_texts(name: str, tmp_path: Path, tokenizer: Path) -> None:
    path = dumps.TEXTS_ALONE[name](tmp_path / "dump")
    with pytest.raises(UserError, match="--tokenizer"):
        analyse([path])
    figures = analyse([path], tokenizer=tokenizer)
    assert figures["format"] == name
    assert {key: figures[key] for key in dumps.FIGURES} == dumps.FIGURES
    assert any("token ids" in lack for lack in figures["lacks"])
    assert figures["grpo_gradient"]["logit_share"] is None


def test_figures_of_a_run_by_hand(tmp_path: Path) -> None:
    figures = analyse([dumps.ours(tmp_path)])
    counts = {s["token"]: (s["protected"], s["amplified"]) for s in figures["conflict"]["strings"]}
    assert counts == {11: (2, 1), 12: (1, 1), 2: (2, 1)}
    assert figures["conflict"]["from_start"][:3] == [3, 2, 0]
    assert figures["conflict"]["from_end"][:2] == [3, 0]
    # |A| is 2 : 1 : 1, of which 3 of 4, 3 of 5 and 2 of 3 tokens are in conflict
    assert figures["grpo_gradient"]["coefficient_share"] == pytest.approx((2 * 3 / 4 + 3 / 5 + 2 / 3) / 4)
    assert figures["truncated"] == pytest.approx(1 / 5)
    assert figures["staleness"] == {"mean": 1.0, "max": 1.0}
    assert figures["reward_terms"]["means"] == [pytest.approx(0.6)]
    assert figures["entropy"]["filter_active"] is None


def test_what_training_saw_is_read_with_the_batch(tmp_path: Path) -> None:
    store = TrajectoryStore(dumps.ours(tmp_path) / "trajectories")
    assert any("what training saw" in lack for lack in analyse([tmp_path])["lacks"])
    batch = store.read(dumps.STEP)
    entropies = [np.full(t.length, 0.25 + t.index, np.float32) for t in batch]
    numbers = {name: np.zeros(len(batch), np.float32) for name in ("gap", "gap_max", "coefficient")}
    seen = Seen(
        entropy=np.array([e.mean() for e in entropies]),
        gate=np.array([1, 0, 1, 1, 0], np.float32),
        entropies=entropies,
        **numbers,
    )
    write_seen(store.directory, dumps.STEP, batch, seen)
    figures = analyse([tmp_path], html=tmp_path / "page.html")
    assert figures["by_step"][0]["entropy"] == pytest.approx(float(seen.entropy.mean()))
    assert figures["by_step"][0]["gate_pass"] == pytest.approx(3 / 5)
    assert [lack for lack in figures["lacks"] if "logging.seen logprobs" in lack]
    # of a batch that was sampled again afterwards nothing is known
    store.write(dumps.STEP, batch[:3])
    assert analyse([tmp_path])["by_step"][0]["gate_pass"] is None


def test_entropy_from_a_runs_metrics(tmp_path: Path) -> None:
    dumps.ours(tmp_path)
    row = {"step": dumps.STEP + 1, "time": 0.0, "loss": 0.1, "entropy/mean": 0.5, "entropy/initial": 0.6}
    dumps.write_jsonl(tmp_path / "metrics.jsonl", [row | {"gate/pass_rate": 0.75}])
    figures = analyse([tmp_path])
    assert figures["entropy"]["initial"] == 0.6
    assert figures["entropy"]["filter_active"] is True
    assert (figures["by_step"][0]["entropy"], figures["by_step"][0]["gate_pass"]) == (0.5, 0.75)


def test_repetition_and_diversity() -> None:
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 9], np.int32)
    assert repetition(tokens, np.array([0, 8, 13])) == pytest.approx(
        1 / 7
    )  # of 5 + 2 runs, 1234 comes back once
    assert diversity(tokens, np.array([0, 4, 8, 12, 13]), np.array([0, 0, 0, 1])) == pytest.approx(
        (1 / 3 + 1) / 2
    )


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = dumps.open_instruct(tmp_path) / "run_rollouts_000000.jsonl"
    path.write_text(path.read_text().replace("-0.5, -0.5, -0.5, -0.5, -0.5", "-0.5, NaN, -0.5, -0.5, -0.5"))
    figures = analyse([path], html=tmp_path / "page.html")
    assert figures["grpo_gradient"]["logit_share"] is None
    assert json.dumps(figures, allow_nan=False)
    assert any("tokenizer" in lack for lack in figures["lacks"])


def test_slime_needs_trust(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trust"):
        analyse([dumps.slime(tmp_path)])


def test_json_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", str(dumps.ours(tmp_path)), "--json"])
    assert not stopped.value.code
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in dumps.FIGURES} == dumps.FIGURES


def test_table_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["analyse", str(dumps.open_instruct(tmp_path))])
    out = capsys.readouterr().out
    assert "protected tokens" in out
    assert "Not in this dump" in out


def test_ids_outside_the_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    path = dumps.open_instruct(tmp_path) / "run_rollouts_000000.jsonl"
    path.write_text(path.read_text().replace("[30, 32]", "[30, 99999]"))
    with pytest.raises(UserError, match=r"run_rollouts_000000.jsonl, line 5: token 1 .* 99999, outside"):
        analyse([path], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[30, 32]", "[30, -1]", r"line 5: response_tokens\[1\] is '-1'"),
        ('"reward": 0.0', '"reward": NaN', "line 2: reward is nan"),
        ('"prompt_idx": 1', '"other": 1', "line 4: prompt_idx is missing"),
        ('"logprobs": [-0.5, -0.5]', '"logprobs": [-0.5]', "line 4: 1 logprobs for 2"),
    ],
)
def test_damaged_lines(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = dumps.open_instruct(tmp_path) / "run_rollouts_000000.jsonl"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"run_rollouts_000000.jsonl, {message}"):
        analyse([path])


def test_truncated_files(tmp_path: Path) -> None:
    path = dumps.open_instruct(tmp_path) / "run_rollouts_000000.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="line 5: not valid JSON .* cut short"):
        analyse([path])
    step = next(dumps.ours(tmp_path / "run").rglob("*.parquet"))
    step.write_bytes(step.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{step.name}.*damaged or cut short"):
        analyse([tmp_path / "run"])


def test_unknown_formats(tmp_path: Path) -> None:
    path = dumps.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(UserError, match=r"x\.jsonl: no rollout dump that is known here"):
        analyse([path])
    with pytest.raises(UserError, match="no such file"):
        analyse([tmp_path / "nothing"])


def test_two_formats_are_not_one_dump(tmp_path: Path) -> None:
    paths = [dumps.ours(tmp_path / "a"), dumps.open_instruct(tmp_path / "b")]
    with pytest.raises(UserError, match="several formats"):
        analyse(paths)
