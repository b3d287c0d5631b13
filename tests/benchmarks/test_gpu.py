"""`make gpu` as far as a machine without a GPU can run it: its parts at toy size, and what it makes of bad ones."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)  # where its own imports start when it runs as a program
    import gpu

    return gpu


def setting(gpu: Any, folder: Path) -> Any:
    return gpu.Setting(folder=folder, model=folder, rehearsal=True, engine=False, fp8=False)


def rehearse(output: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *parts, "--rehearse", "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "torch sees no CUDA GPU here" in done.stderr


@pytest.mark.soak
def test_some_parts_are_rehearsed(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = rehearse(output, "doctor", "steps", "weights")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["device"] == "none: a rehearsal on a CPU"
    _, steps, weights = (part["result"] for part in report["parts"])
    local = steps["local-bf16"]
    assert local["layers"] == "ColumnParallelLinear" and local["tokens"] > 60
    assert local["logprob_gap"]["max_abs"] == 0 and len(local["losses"]) == 2
    assert {row.get("left_out") for name, row in steps.items() if name != "local-bf16"} == {
        "no usable Transformer Engine"
    }
    assert weights["tensors"] > 20 and weights["gib_per_s"] > 0
    assert "local-bf16" in done.stdout  # the table


@pytest.mark.rehearsal
def test_every_other_part_is_rehearsed(gpu: Any, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    others = [part.name for part in gpu.PARTS if part.name not in ("doctor", "steps", "weights")]
    done = rehearse(output, *others)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {part["part"]: part for part in json.loads(output.read_text())["parts"]}
    left_out = {name for name, part in parts.items() if part["status"] == "left out"}
    assert list(parts) == others and left_out <= {"transfer", "together"}
    assert "all equal" in parts["resume"]["result"]["bf16"]
    assert parts["quickstart"]["result"]["steps"] == 2


def test_a_bad_part_keeps_no_other_from_running(gpu: Any, tmp_path: Path) -> None:
    def raises(setting: Any) -> dict[str, Any]:
        raise ValueError("a kernel is missing")

    def partly(setting: Any) -> dict[str, Any]:
        raise gpu.PartlyFailed({"bf16": 1}, "fp8: out of memory")

    def dies(setting: Any) -> dict[str, Any]:
        import os

        os._exit(9)

    def hangs(setting: Any) -> dict[str, Any]:
        # a part's own child must not outlive it either
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)
        return {}

    def leaves_out(setting: Any) -> dict[str, Any]:
        raise gpu.LeftOut("no server here")

    jobs = (raises, partly, dies, hangs, leaves_out, lambda setting: {"seconds": 1})
    start = time.monotonic()
    outcomes = [
        gpu.attempt(gpu.Part(str(number), "", 3 if job is hangs else 60, job), setting(gpu, tmp_path))
        for number, job in enumerate(jobs)
    ]
    assert time.monotonic() - start < 60
    assert [outcome.status for outcome in outcomes] == ["failed"] * 4 + ["left out", "passed"]
    said = [outcome.said for outcome in outcomes]
    assert said == [
        "ValueError: a kernel is missing",
        "fp8: out of memory",
        "its process died",
        "not done after 3 s",
        "no server here",
        "",
    ]
    assert outcomes[1].result == {"bf16": 1} and outcomes[5].result == {"seconds": 1}
