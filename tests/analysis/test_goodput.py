"""Where the time of a run went: killed, requeued and local runs, from the files that they leave."""

import os
import subprocess
from pathlib import Path

import pytest

from gtpo_megatron.analysis.goodput import Goodput, account, goodput_notes, goodput_rows, read_goodput
from gtpo_megatron.cluster.record import Start, read_starts
from gtpo_megatron.cluster.submission import SCRIPTS
from gtpo_megatron.config import LoggingConfig
from gtpo_megatron.run.metrics import MetricsWriter, read_metrics


def step(number: int, time: float) -> dict:
    """A step of 10 s that ends at `time`."""
    return {"step": number, "time": time, "seconds/rollout": 6.0, "seconds/training": 4.0}


def everything(found: Goodput) -> float:
    return found.running + (found.queue or 0) + (found.idle or 0) + found.unknown


# submitted at 1000; killed in step 4, after a checkpoint of step 2; requeued; then a second job
STARTS = [
    Start(1, "7", 1100.0, 1180.0, "137"),
    Start(2, "7", 1300.0, 1345.0, "3"),
    Start(3, "8", 1500.0, 1540.0, "0"),
]
KEPT = [
    {"step": 0, "time": 1120.0, "eval/accuracy": 0.1},
    step(1, 1140.0),
    step(2, 1150.0),
    step(3, 1330.0),
    step(4, 1340.0),
    step(5, 1530.0),
    {"step": 5, "time": 1537.0, "eval/accuracy": 0.5},
]
LOST = [step(3, 1162.0), step(4, 1172.0)]


def test_a_run_of_three_starts_is_split_whole() -> None:
    # a line that two processes have moved counts once
    found = account(KEPT, [*LOST, LOST[0]], STARTS, {"7": 1000.0, "8": 1400.0})
    assert found.stages == {"rollout": 30.0, "training": 20.0}
    assert found.starting == 20 + 10 + 20 + 20  # the first evaluation is part of it
    assert (found.repeated, found.repeated_steps) == (2 + 10 + 10 + 8, 2)
    assert (found.evaluation, found.between) == (7.0, 5 + 3)
    assert (found.queue, found.idle, found.unknown) == (100 + 120 + 100, 55.0, 0.0)
    assert found.running == 80 + 45 + 40 and everything(found) == 1540 - 1000
    assert found.share == 50 / 165
    rows = {name: seconds for name, seconds, _ in goodput_rows(found)}
    assert rows["queue"] == "320.0" and rows["repeated work: 2 steps, and what failures cut off"] == "30.0"
    assert goodput_notes(found).startswith("30% of the time") and "not known" not in goodput_notes(found)


def test_what_nobody_saw_is_not_called_queue() -> None:
    lost_node = [Start(1, "7", 1100.0, None, None), *STARTS[1:]]
    found = account(KEPT, LOST, lost_node, {})
    assert found.queue is None and found.idle is None
    assert found.unknown == (1300 - 1172) + (1500 - 1345)
    assert everything(found) == 1540 - 1100
    assert "first job waited in the queue is not known" in goodput_notes(found)
    copied = account(KEPT, LOST, STARTS, {"7": 9000.0, "8": 9000.0})  # the files are newer than the run
    assert copied.queue == 120.0 and not copied.first_queue_known


def test_a_start_that_is_refused_is_no_time_of_the_run() -> None:
    refused = Start(2, "9", 1125.0, 1130.0, "2")
    found = account(KEPT[:3], [], [Start(1, "7", 1100.0, 1160.0, "3"), refused], {"7": 1100.0})
    assert (found.starting, found.between, everything(found)) == (30.0, 10.0, 60.0)


def test_a_local_run_has_no_queue_and_says_so() -> None:
    rows = [step(1, 110.0), step(2, 125.0), {"step": 2, "time": 128.0, "eval/accuracy": 0.1}]
    found = account(rows, [], [], {})
    assert (found.starting, found.queue, found.idle) == (None, None, None)
    assert (found.between, found.evaluation, found.share) == (5.0, 3.0, 20 / 28)
    shown = goodput_rows(found)
    assert ("queue", "not known", "") in shown and ("steps: rollout", "12.0", "42.9%") in shown
    assert "there is no queue" in goodput_notes(found)
    assert account([], [], [], {}).share == 0.0


def test_the_scripts_leave_the_times_that_are_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    submission = run / "submissions" / "1"
    submission.mkdir(parents=True)
    (submission / "job_id").write_text("9\n")
    body = f'source {SCRIPTS / "lib.sh"}; begin_attempt {run}; step_code="$1"; newest_step() {{ echo 1; }}; end_attempt 0'
    for code in ("1", "0"):  # the first fails; without scontrol it cannot be requeued
        environ = os.environ | {"SLURM_JOB_ID": "9"}
        subprocess.run(["bash", "-c", body, "job", code], env=environ, capture_output=True)
    first, second = starts = read_starts(run)
    assert [(start.number, start.job_id, start.how) for start in starts] == [(1, "9", "1"), (2, "9", "0")]
    assert first.began <= first.ended <= second.began <= second.ended
    with (run / "attempts" / "2" / "times").open("w") as file:
        file.write("began 17")  # cut short
    assert read_starts(run) == [first]
    (run / "attempts" / "3" / "times").mkdir(parents=True)  # no file
    assert read_starts(run) == [first]
    with MetricsWriter(run, LoggingConfig(tensorboard=False)) as metrics:
        for number in (1, 2, 3):
            metrics.log(number, {"seconds/training": 0.0})
        metrics.truncate_after(1)
    found = read_goodput(run, read_metrics(run / "metrics.jsonl"))
    assert (found.starts, found.repeated_steps) == (1, 2)
    assert found.queue == pytest.approx(0.0, abs=10.0) and found.first_queue_known
