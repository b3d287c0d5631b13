"""Predictions against published figures, row by row, within the bounds that docs/planner.md states."""

import csv
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gtpo_megatron.commands.cli import main
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.facts import find_gpu, find_model, published_shape
from gtpo_megatron.plan.published import Comparison, compare, compare_row

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
FILE = ROOT / "tests" / "fixtures" / "published-h100.csv"
BOUNDS = {"dense": 0.15, "mixture": 0.40, "rl": 0.25, "memory": 0.05, "serving": 0.25}


def rows() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def family(comparison: Comparison, model: str) -> str:
    if comparison.kind == "peak memory":
        return "memory"
    if comparison.kind == "GRPO step":
        return "rl"
    if "serving" in comparison.kind:
        return "serving"
    return "mixture" if find_model(model).experts else "dense"


def test_every_published_row_is_within_its_bound() -> None:
    models = {row["id"]: row["model"] for row in rows()}
    compared = compare(FILE)
    for c in compared:
        print(f"{c.id:70} {c.kind:36} {c.predicted:10.1f} {c.published:10.1f} {c.error:+7.1%} {c.unit}")
    assert {c.id for c in compared} == set(models) and all(c.reason is None for c in compared)
    found = {family(c, models[c.id]) for c in compared}
    assert found == set(BOUNDS)
    beyond = [c for c in compared if abs(c.error) > BOUNDS[family(c, models[c.id])]]
    assert beyond == []
    for c in compared:
        assert c.error == pytest.approx(c.predicted / c.published - 1)
        assert c.uncertainty == BOUNDS[family(c, models[c.id])]


def test_a_prediction_does_not_look_at_the_result() -> None:
    for row in rows():
        first, other = next(compare_row(row)), next(compare_row(row | {"result": "1"}))
        assert first.predicted == other.predicted, row["id"]


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("model", "Nemotron-H-56B", "model 'Nemotron-H-56B' is not known"),
        ("system", "TPU v5", "GPU 'TPU v5' is not known"),
        ("gpus", "63", "gpus: 63 is not a multiple of TP x PP x CP"),
        ("gpus", "-64", "gpus: '-64' is no number of the kind"),
        ("seq_len", "", "seq_len: '' is no number of the kind"),
        ("precision", "NVFP4", "precision: 'NVFP4' is not modelled"),
        ("result", "", "result: '' is no figure"),
        ("result", "nan", "result: 'nan' is no figure"),
        ("unit", "samples/s", "unit: 'samples/s' is not modelled"),
        ("kind", "Astrology", "kind: 'Astrology' is not modelled"),
        ("GBS", "1", "GBS: 1 is less than a micro-batch"),
    ],
)
def test_a_row_that_is_not_modelled_says_why(column: str, value: str, reason: str) -> None:
    row = next(row for row in rows() if row["id"].startswith("mb-25.09-LLAMA3_70B"))
    (comparison,) = compare_row(row | {column: value})
    assert comparison.predicted is None and comparison.error is None
    assert reason in comparison.reason


@pytest.mark.parametrize(
    "start", ["mb-25.09-LLAMA3_70B", "mb-25.11-Qwen3_30B", "nrl-0.6-DeepSeek", "titan-0", "en_qwen3"]
)
def test_no_cell_makes_a_traceback(start: str) -> None:
    row = next(row for row in rows() if row["id"].startswith(start))
    odd = (
        "",
        "0",
        "-1",
        "7",
        "64,64",
        "nan",
        "1e9",
        "9" * 15,
        "½",
        "isl 0 osl 0",
        "concurrency 0",
        "peak memory . GiB",
    )
    odd += ("0 rollouts/step; mean total length 700.5.3", "8 rollouts/step; mean total length 700; TP,PP=0,1")
    for column in row:
        for value in odd:
            for comparison in compare_row(row | {column: value}):
                assert (comparison.predicted is None) == bool(comparison.reason), (column, value)
                assert comparison.predicted is None or comparison.predicted > 0, (column, value)


def test_half_the_gpus_may_hold_fewer_experts_than_they_are_spread_over() -> None:
    """A GRPO run one step ahead is taken as giving half its GPUs to training."""
    row = next(row for row in rows() if row["id"].startswith("nrl-0.6-DeepSeek"))
    (comparison,) = compare_row(row | {"gpus": "256"})
    assert comparison.predicted is not None and comparison.predicted > 0


@pytest.mark.parametrize("directory", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_shapes_are_those_of_config_json(directory: str) -> None:
    own = read_shape(str(CONFIGS / directory))
    unused = {"max_positions": 0} | ({"ffn": 0} if own.experts else {})
    assert published_shape(f"someone/{directory}") == replace(own, **unused)


def test_a_family_that_is_not_trained_here_has_no_shape() -> None:
    assert published_shape("deepseek-ai/DeepSeek-V3") is None
    assert published_shape("nobody/Nothing-1B") is None


def test_spellings_of_a_model_and_a_machine() -> None:
    assert find_model("GPT OSS 120B") == find_model("openai/gpt-oss-120b")
    assert find_model("Qwen3_30B_a3B") == find_model("Qwen/Qwen3-30B-A3B")
    assert find_model("meta-llama/Llama-3.1-8B-Instruct") == find_model("LLAMA3_8B")
    assert find_gpu("DGX-H100") == find_gpu("h100_sxm") == find_gpu("H100-SXM")


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Llama-3.1-8B", 8.03, 7.50),
        ("Llama-3.1-405B", 405.9, 403.8),
        ("Qwen3-30B-A3B", 30.5, 3.04),
        ("GPT-OSS-120B", 116.8, 5.1),
        ("DeepSeek-V3", 671.0, 36.6),
    ],
)
def test_sizes_are_those_that_the_authors_state(name: str, billions: float, active: float) -> None:
    model = find_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    working = model.dense_parameters + model.active_expert_parameters + model.head_parameters
    assert working / 1e9 == pytest.approx(active, rel=0.01)


def test_rows_of_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, a column of its own, and a row that is cut short."""
    header, first, *_ = FILE.read_text(encoding="utf-8").splitlines()
    (tmp_path / "own.csv").write_text(f"\ufeff{header},colour\r\n{first},red\r\nshort,GRPO step\r\n")
    whole, short = compare(tmp_path / "own.csv")
    assert whole == compare(FILE)[0]
    assert short.reason == "result: '' is no figure"


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read it"):
        compare(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("id,model\n1,x\n")
    with pytest.raises(UserError, match="columns are missing: kind, gpus"):
        compare(tmp_path / "other.csv")


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["plan", "--published", FILE, "--json"], capsys)
    printed = json.loads(out)
    assert code == 0 and {row["id"] for row in printed} == {row["id"] for row in rows()}
    assert {"id", "kind", "predicted", "published", "error", "unit", "reason"} <= set(printed[0])
    code, out, _ = run(["plan", "--published", FILE], capsys)
    assert code == 0 and "titan-5" in out


def test_the_table_of_the_page_is_the_programs() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_planner_docs", ROOT / "tools" / "make_planner_docs.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run tools/make_planner_docs.py"
