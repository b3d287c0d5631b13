"""The plan of a recipe: its parts, its search, and what is said where it cannot stand."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.estimate import completion_lengths, make_plan
from gtpo_megatron.plan.facts import efficiency, find_gpu
from gtpo_megatron.plan.sampling import share_of_server, spread_lengths
from gtpo_megatron.plan.search import search, splits
from tests.plan.test_published import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
RECIPE = ROOT / "recipes" / "large" / "llama-3.1-70b-math-bf16.yaml"
MODEL = f"model.path={CONFIGS / 'Llama-3.1-70B-Instruct'}"
MIXTURE = ROOT / "recipes" / "large" / "qwen3-30b-a3b-math-16k-bf16.yaml"


def planned(*settings: str, gpus: int = 64, gpu: str = "h100-sxm", lengths: Path | None = None):
    config = load_recipe(RECIPE, [MODEL, *settings])
    tokens = completion_lengths(config, lengths)
    return make_plan(config, read_shape(config.model.path), gpus, find_gpu(gpu), tokens, efficiency())


def test_weights_gradients_and_adam_are_the_exact_ones() -> None:
    worst = planned().worst
    assert round((worst.weights + worst.gradients + worst.optimizer) / 2**30, 1) == 25.4  # as in its header


def test_offload_trades_memory_of_gpus_for_the_hosts_and_for_time() -> None:
    own, offloaded = planned(), planned("optimizer.offload=true")
    assert offloaded.worst.optimizer == 0
    assert own.worst.total - offloaded.worst.total == own.worst.optimizer > 0
    # 12 bytes a parameter of Adam's and 4 of its gradient, of the eight GPUs of a node
    most = max(stage.optimizer for stage in own.memory)
    assert offloaded.host_memory == pytest.approx(8 * most * 16 / 12)
    assert own.host_memory == 0
    assert offloaded.step.training.optimizer > 20 * own.step.training.optimizer
    changed = {n for n, v in vars(own.step.training).items() if v != vars(offloaded.step.training)[n]}
    assert changed == {"optimizer"}


def test_recomputation_trades_memory_for_time() -> None:
    none, full = planned("training.recompute=none"), planned("training.recompute=full")
    assert full.worst.activations < none.worst.activations / 4
    assert full.step.training.total > 1.25 * none.step.training.total


def test_longer_completions_take_longer(tmp_path: Path) -> None:
    (tmp_path / "even.txt").write_text("1000\n" * 64)
    (tmp_path / "tail.txt").write_text("800\n" * 60 + "4000\n" * 4)  # the same mean
    even, tail = planned(lengths=tmp_path / "even.txt"), planned(lengths=tmp_path / "tail.txt")
    assert even.step.tokens == pytest.approx(tail.step.tokens, rel=0.01)
    assert tail.step.sampling > 2 * even.step.sampling  # the last completions decide


def test_staleness_hides_the_shorter_of_training_and_sampling() -> None:
    ahead, lockstep = planned().step, planned("rollout.staleness=0").step
    own = ahead.training.total + ahead.scoring + ahead.transfer
    assert lockstep.step - ahead.step == pytest.approx(min(own, ahead.sampling))


def test_lengths_of_a_spread_have_its_mean_and_limit() -> None:
    lengths = spread_lengths(900, 4000, 512)
    assert sum(lengths) / 512 == pytest.approx(900, rel=1e-3)
    assert max(lengths) == 4000
    assert max(share_of_server(lengths, 16)) == max(lengths)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no lengths there"),
        ("12\n-3\n", "lengths.txt:2: '-3' is no number of tokens above 0"),
        ("12\n0\n", ":2: '0'"),
        ("nan\n", ":1: 'nan'"),
        ("[]", "no lengths there"),
        ("[5, -1]", ":2: '-1'"),
        ("many\n", ":1: 'many'"),
    ],
)
def test_lengths_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        completion_lengths(load_recipe(RECIPE, [MODEL]), file)
    assert said in str(error.value)


def test_a_directory_without_trajectories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trajectories"):
        completion_lengths(load_recipe(RECIPE, [MODEL]), tmp_path)


def test_lengths_of_a_run(tmp_path: Path) -> None:
    from gtpo_megatron.trajectories.store import TrajectoryStore
    from tests.policy.step_jobs import sample_batch

    batch = sample_batch()
    TrajectoryStore(tmp_path / "trajectories").write(0, batch)
    lengths = completion_lengths(load_recipe(RECIPE, [MODEL]), tmp_path)
    assert sorted(lengths) == sorted(float(t.length) for t in batch)


def test_a_search_orders_what_fits_and_says_why_the_rest_loses() -> None:
    config = load_recipe(RECIPE, [MODEL])
    tokens = completion_lengths(config, None)
    started = time.monotonic()
    found = search(config, read_shape(config.model.path), 64, find_gpu("h100-sxm"), tokens, efficiency())
    assert time.monotonic() - started < 60
    fitting = [c for c in found if c.plan.fits]
    seconds = [c.plan.step.training.total for c in fitting if c.plan.step.step == fitting[0].plan.step.step]
    assert found[: len(fitting)] == fitting and seconds == sorted(seconds)
    assert fitting[0].reason == "" and all(c.reason for c in found[1:])
    assert all("does not fit; most:" in c.reason for c in found[len(fitting) :])


def test_splits_share_the_gpus_between_trainer_and_servers() -> None:
    config = load_recipe(RECIPE, [MODEL])
    tokens = completion_lengths(config, None)
    shape = read_shape(config.model.path)
    for total in (64, 63):  # of the latter seventh and eighth parts hold no server of four GPUs
        found = splits(config, shape, total, find_gpu("h100-sxm"), tokens, efficiency())
        steps = [c.plan.step.step for c in found]
        assert steps == sorted(steps) and found[0].reason == "" and all(c.reason for c in found[1:])
        assert all(
            c.plan.fits and c.plan.gpus + c.plan.servers * c.plan.server.tensor <= total for c in found
        )
    assert splits(config, shape, 8, find_gpu("h100-sxm"), tokens, efficiency()) == []


def test_a_plan_for_1024_gpus_answers(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    code, out, _ = run(["plan", RECIPE, MODEL, "--gpus", 1024, "--json"], capsys)
    assert time.monotonic() - started < 10
    plan = json.loads(out)
    assert code == 0 and plan["gpus"] == 1024 and plan["fits"]
    parts = plan["memory"]
    assert parts["total"] == pytest.approx(
        sum(v for k, v in parts.items() if k not in ("limit", "total", "worst_stage"))
    )
    assert set(plan["uncertainty"]) == {"memory", "training", "step"}


def test_a_hub_name_needs_no_hub(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["plan", RECIPE, "--gpus", 64, "--json"], capsys)
    assert code == 0 and "its published shape is taken" in err
    _, of_config, _ = run(["plan", RECIPE, MODEL, "--gpus", 64, "--json"], capsys)
    assert json.loads(out) == json.loads(of_config)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"model.path={CONFIGS / 'Qwen3-30B-A3B'}"
    code, out, _ = run(["plan", MIXTURE, path, "--gpus", 32], capsys)
    assert code == 0 and "routing" in out and "GiB on a GPU of stage" in out
    code, out, _ = run(["plan", MIXTURE, path, "--gpus", 8, "--search"], capsys)
    assert code == 0 and "does not fit; most:" in out and "the fastest that fits" in out
    assert "for trainer and servers together" not in out  # on less than 8 nothing fits
    code, out, _ = run(["plan", MIXTURE, path, "--gpus", 32, "--search"], capsys)
    assert code == 0 and "32 GPUs for trainer and servers together" in out and "the best" in out


def test_numbers_of_gpus_have_a_table_json_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "scaling.png"
    grown = ["plan", RECIPE, MODEL, "--gpus", 16, "--up-to", 64]
    code, out, _ = run([*grown, "--plot", picture], capsys)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert "nothing fits on 16: the smallest takes" in out and "training ± 15%" in out
    code, out, _ = run([*grown, "--json"], capsys)
    rows = json.loads(out)
    assert code == 0 and [(row["gpus"], row["fits"]) for row in rows] == [(16, False), (32, True), (64, True)]
    _, out, _ = run(["plan", RECIPE, MODEL, "--gpus", 64, "--search", "--json"], capsys)
    best = json.loads(out)["layouts"][0]
    assert best["parallel"] == rows[-1]["parallel"] and best["seconds"] == rows[-1]["seconds"]


def test_overlapped_gradients_take_less_time() -> None:
    apart, beside = planned("training.overlap_grad_reduce=false", gpus=1024), planned(gpus=1024)
    assert beside.step.training.data < 0.6 * apart.step.training.data
    assert beside.collectives == apart.collectives


def test_a_plan_names_what_is_sent_and_what_limits(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(gpus=1024)
    sent = {(c.kind, c.group): c.ranks for c in made.collectives}
    assert sent[("all_gather", "tensor")] == 8 and sent[("reduce_scatter", "data")] == 32
    _, out, _ = run(["plan", RECIPE, MODEL, "--gpus", 1024], capsys)
    for words in (
        "a rank sends in a step",
        "KV cache, ",
        "left",
        "limited: training by matmul, a step by sampling",
    ):
        assert words in out
    own = made.step.training.total + made.step.scoring + made.step.transfer
    assert made.step.overlapped and made.step.step == max(own, made.step.sampling) + made.step.overhead


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", 64, "--gpu", "h10"], "GPU 'h10' is not known; did you mean h100-sxm?"),
        (["--gpus", 60], "nearest that works: --gpus 64"),
        (
            ["--gpus", 64, "training.recompute=none", "training.micro_batch_tokens=32768"],
            "the fastest that does on 64 GPUs: parallel.tensor=",
        ),
        (
            ["--gpus", 8, "parallel.pipeline=1", "parallel.virtual_pipeline=null"],
            "no layout fits on 8 GPUs; nearest that works: --gpus 32, parallel.tensor=",
        ),
        (["--gpus", 8, "--search"], "no layout fits on 8 GPUs; nearest that works: --gpus 32,"),
        (["--gpus", 0], "--gpus"),
        (["--gpus", 10**8], "--gpus"),
        (["--gpus", 32768], "fewer sequences in a step than the 1024 data-parallel ranks"),
        (["--gpus", 32768], "nearest that works: --gpus 16384"),
        (["--gpus", 64, "--gpu", "a100", "model.fp8=hybrid"], "a100 has no FP8"),
        (["--published", "x.csv"], "give no recipe with it"),
        (["--plot", "x.png"], "--plot is of --up-to"),
        (["--up-to", 4], "--up-to 4: is below --gpus 8"),
        (["--up-to", 64, "--search"], "give no --search with it"),
        (["--gpus", 8, "--up-to", 16], "nothing fits on 8 to 16 GPUs"),
        (["--gpus", 32, "--up-to", 32, "--plot", "x.nothing"], "--plot: x.nothing: cannot be written"),
    ],
)
def test_what_cannot_stand_names_the_nearest_that_does(
    arguments: list, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["plan", RECIPE, MODEL, *arguments], capsys)
    assert code == 2 and said in " ".join(err.split())


def test_the_scaling_page_has_the_programs_figures() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_scaling_docs", ROOT / "tools" / "make_scaling_docs.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    lines = tool.PAGE.read_text(encoding="utf-8").splitlines()
    assert all(
        any(f"| {model} | {gpus} |" in line for line in lines) for model in tool.MODELS for gpus in tool.GPUS
    )
    for model, gpus in (
        ("Llama-3.1-70B-Instruct", 64),
        ("Qwen3-30B-A3B", 128),
        ("Llama-3.1-70B-Instruct", 8),
    ):
        assert tool.row(model, gpus) in lines, "run tools/make_scaling_docs.py"
    assert f"images/{tool.PLOT.name}" in tool.PAGE.read_text(encoding="utf-8")
