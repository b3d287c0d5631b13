"""Training on a real Slurm of virtual nodes: what the sbatch file and the ranks do when they end, in all ways."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gtpo_megatron.cluster.record import job_ids
from gtpo_megatron.errors import COMPLETE, MISTAKE, STUCK
from gtpo_megatron.run.directory import read_status
from tests.slurm.runs import TRAIN, ended, figures, hold, last_line, steps, wait_until, wait_until_held
from tests.slurm.virtual import VirtualSlurm

pytestmark = pytest.mark.slurm


def test_a_run_that_is_stopped_and_loses_a_rank_ends_as_one_that_is_left_alone(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 3)
    job_id = submit("small")
    wait_until(
        lambda: len(steps(run)) == 3 and read_status(run).step == 3, "three steps, in the status as well"
    )
    shown = json.loads(cluster.run(*TRAIN, "status", run, "--json", environment=environment).stdout)
    assert (shown["state"], shown["status"]["job_id"], shown["steps_at_risk"]) == ("running", job_id, 3)
    jobs = [(job["job_id"], job["state"], job["nodes"]) for job in shown["jobs"]]
    assert jobs == [(job_id, "RUNNING", "node[1-2]")]

    wait_until_held(run, 3)
    cluster.run("scancel", "--signal=USR1", job_id)
    wait_until(lambda: read_status(run).state == "stopping", "the signal has reached rank 0")
    hold(run, 7)
    wait_until(lambda: steps(run)[-1] == 7, "seven steps")
    assert ended(run) == [["1", job_id, "4", "3"]]  # the step under way was finished, and no other begun
    assert cluster.job(job_id)["Restarts"] == "1"

    rank = cluster.run("pgrep", "-f", "gtpo_megatron train", node="node2").stdout.split()[-1]
    cluster.run("kill", "-KILL", rank, node="node2")
    (run.parents[1] / "hold").unlink()
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2")
    assert [how for *_, how in ended(run)] == ["3", "137", "0"]
    log = (run / f"slurm-{job_id}.log").read_text()
    assert "END stopped after step 4; requeued" in log
    assert "END failed at step 7: node2: task 1: Killed" in log
    assert log.splitlines()[-1].endswith("END complete at step 12")
    logs = {path.name for path in (run / "attempts" / "latest").iterdir()}
    assert logs == {"pulse", "times", "srun.log", "rank-0.log", "rank-1.log"}
    assert (read_status(run).state, read_status(run).exit_code) == ("complete", COMPLETE)

    # left alone, and by a plain srun: that it is one world of two shows in the logs of its ranks
    plain = recipe.parent / "runs" / "plain"
    srun = ("srun", "--nodes=2", "--ntasks=2", "--mem=1000")
    cluster.run(*srun, *TRAIN, "train", recipe, "name=plain", environment=environment, timeout_s=240)
    assert sorted(path.name for path in (plain / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert figures(run) == figures(plain)
    assert steps(run) == list(range(1, 13))


@pytest.mark.soak
def test_a_run_goes_on_elsewhere_when_the_power_of_its_first_node_is_cut(
    cluster: VirtualSlurm, recipe: Path, submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 3)
    job_id = submit("small", "checkpoint.every=2")
    wait_until(lambda: len(steps(run)) == 3, "three steps")
    first = read_status(run).host  # of rank 0, which holds the lease, and of the batch script
    cluster.cut_power(first)
    try:
        (run.parents[1] / "hold").unlink()
        job = cluster.wait_for_job(job_id)
    finally:
        cluster.power_on(first)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert read_status(run).host != first
    assert ended(run) == [["2", job_id, "12", "0"]]  # nobody was left to say how the first attempt ended
    assert steps(run) == list(range(1, 13))
    cluster.wait_until_idle()


@pytest.mark.soak
def test_a_rank_that_hangs_is_found_and_the_job_goes_on_without_its_node(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    with site.open("a") as file:
        file.write("hung_after_s: 15\n")
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 3)
    job_id = submit("small", "training.steps=5")
    wait_until(lambda: len(steps(run)) == 3, "three steps")
    assert sorted(path.name for path in (run / "attempts/1/pulse").glob("[0-9]*")) == ["0.node1", "1.node2"]
    rank = cluster.run("pgrep", "-f", "gtpo_megatron train", node="node2").stdout.split()[-1]
    cluster.run("kill", "-STOP", rank, node="node2")
    hold(run, 10)  # rank 0 waits for the other in a collective
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"], job["ExcNodeList"]) == ("COMPLETED", "1", "node2")
    assert "node2" not in job["NodeList"]
    log = (run / f"slurm-{job_id}.log").read_text()
    assert "END failed at step 3: rank.node 1.node2 gave no sign of life for 15 s; " in log
    assert "; requeued without node2" in log
    assert "gtpo_megatron/train.py" in (run / "attempts/1/rank-0.log").read_text()  # where it waited
    assert [row[1:] for row in ended(run)] == [[job_id, "3", "hung"], [job_id, "5", "0"]]
    assert steps(run) == [1, 2, 3, 4, 5]
    assert list((run / "attempts/2/pulse").glob("[0-9]*")) == []


@pytest.mark.soak
def test_a_run_makes_way_for_a_job_of_higher_priority_and_comes_back(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    job_id = submit("small", "training.steps=4")
    wait_until_held(run, 2)
    words = ("--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    urgent = cluster.run("sbatch", *words, "--wrap=true", environment=environment).stdout.strip()
    wait_until(lambda: read_status(run).state == "stopping", "the signal has reached rank 0")
    (run.parents[1] / "hold").unlink()
    assert cluster.wait_for_job(urgent)["JobState"] == "COMPLETED"
    job = cluster.wait_for_job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    first = ended(run)[0][1:]
    assert first == [job_id, "3", "term"]  # the step under way was finished, and saved
    assert steps(run) == [1, 2, 3, 4]


@pytest.mark.soak
def test_a_sweep_is_an_array_of_jobs_each_with_the_record_of_a_run(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, site: Path
) -> None:
    file = recipe.parent / "rates.yaml"
    axes = {"lr": {"low": ["optimizer.lr=1e-3"], "high": ["optimizer.lr=1e-2"]}}
    file.write_text(yaml.safe_dump({"name": "rate", "recipe": recipe.name, "axes": axes}))
    command = (*TRAIN, "submit", file, "--sweep", "--site", site, "--nodes", "1")  # ranks cost their start
    command += ("parallel.tensor=1", "training.steps=1", "optimizer.warmup_steps=0")
    shown = cluster.run(*command, environment=environment).stdout
    runs = [recipe.parent / "runs" / name for name in ("rate-high", "rate-low")]
    jobs = [job_ids(run)[-1] for run in runs]
    array = jobs[0].removesuffix("_0")
    assert jobs == [f"{array}_0", f"{array}_1"] and f"job array {array}, " in shown
    for run, job_id in zip(runs, jobs, strict=True):
        assert cluster.wait_for_job(job_id)["JobState"] == "COMPLETED"
        assert steps(run) == [1]
        log = recipe.parent / "runs" / "rates.sweep" / f"slurm-{job_id}.log"
        assert log.read_text().splitlines()[-1].endswith("END complete at step 1")
    shown = cluster.run(*command, environment=environment).stdout
    assert shown == f"{file}: all runs are complete\n"


@pytest.mark.soak
def test_a_run_is_stopped_for_good_and_later_cancelled(
    cluster: VirtualSlurm, recipe: Path, submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    first = submit("small")
    wait_until_held(run, 2)
    cluster.run("scontrol", "update", f"jobid={first}", "requeue=0")
    cluster.run("scancel", "--signal=USR1", first)
    wait_until(lambda: read_status(run).state == "stopping", "the signal has reached rank 0")
    hold(run, 6)
    job = cluster.wait_for_job(first)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0")
    assert "END stopped after step 3; cannot be requeued (" in last_line(run, first)

    second = submit("small")
    wait_until_held(run, 6)
    cluster.run("scancel", second)
    (run.parents[1] / "hold").unlink()
    wait_until(lambda: len(ended(run)) == 2, "the second attempt has ended")
    assert cluster.wait_for_job(second)["JobState"] == "CANCELLED"
    assert [row[1:] for row in ended(run)] == [[first, "3", "3"], [second, "7", "term"]]
    assert "END asked by Slurm to end at step 7 (" in last_line(run, second)
    status = read_status(run)
    assert (status.state, status.checkpoint_step) == ("stopped", 7)  # in time, and nothing is lost


def test_a_mistake_is_said_in_the_last_line_and_not_requeued(
    cluster: VirtualSlurm, recipe: Path, submit: Callable[..., str]
) -> None:
    with tempfile.NamedTemporaryFile(
        dir="/dev/shm", suffix=".jsonl"
    ) as here:  # each node has a /dev/shm of its own
        here.write((recipe.parent / "prompts.jsonl").read_bytes())
        here.flush()
        job_id = submit("mistake", f"data.path={here.name}")
        job = cluster.wait_for_job(job_id)
    run = recipe.parent / "runs" / "mistake"
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", f"{MISTAKE}:0")
    line = last_line(run, job_id)
    assert "END mistake: gtpo-megatron: " in line and here.name in line
    assert ended(run) == [["1", job_id, "0", "2"]]


def test_a_job_that_never_makes_a_step_is_requeued_no_more_than_it_may(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    broken = recipe.parent / "python"
    broken.write_text("#!/bin/sh\necho out of luck\nexit 7\n")
    broken.chmod(0o755)
    site.write_text(f"{site.read_text()}\npython: {broken}\n".replace(f"python: {sys.executable}\n", ""))
    job_id = submit("unlucky", "--retries=1")
    job = cluster.wait_for_job(job_id)
    run = recipe.parent / "runs" / "unlucky"
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1")
    assert ended(run) == [["1", job_id, "0", "7"], ["2", job_id, "0", "7"]]
    *_, log, line = (run / f"slurm-{job_id}.log").read_text().splitlines()
    assert "END failed 2 times without a new step after step 0, not requeued: node" in line
    assert log == "out of luck"


@pytest.mark.soak
def test_a_conversion_and_an_evaluation_wait_for_a_run_that_is_requeued_meanwhile(
    cluster: VirtualSlurm, environment: dict[str, str], recipe: Path, submit: Callable[..., str]
) -> None:
    (recipe.parent / "runs").mkdir()
    run = recipe.parent / "runs" / "small"
    hold(run, 2)
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(values | {"evaluation": {"data": values["data"]}}))
    job_id = submit("small", "training.steps=4")
    files = run / "submissions" / "1"

    def after(job: str, name: str, *words: str) -> str:
        command = ("sbatch", "--parsable", f"--dependency=afterok:{job}", files / name, *words)
        return cluster.run(*command, environment=environment).stdout.strip()

    conversion = after(job_id, "convert.sbatch", "--no-logits")
    evaluation = after(conversion, "evaluate.sbatch", f"model.path={run / 'converted'}")
    refused = after(conversion, "convert.sbatch")  # there is one already
    wait_until_held(run, 2)
    cluster.run("scancel", "--signal=USR1", job_id)
    wait_until(lambda: read_status(run).state == "stopping", "the signal has reached rank 0")
    (run.parents[1] / "hold").unlink()
    assert cluster.wait_for_job(job_id)["Restarts"] == "1"
    assert cluster.wait_for_job(evaluation)["JobState"] == "COMPLETED"
    assert (run / "converted" / "config.json").exists()
    assert last_line(run, conversion).endswith(f"END complete: {run / 'converted'}")
    log = run / "evaluating" / "1" / "rank-0.log"
    assert last_line(run, evaluation).endswith(f"the figures are in {log}")
    assert f"scoring model.path: {run / 'converted'}" in log.read_text()
    assert cluster.wait_for_job(refused)["ExitCode"] == f"{MISTAKE}:0"
    assert "END mistake: gtpo-megatron: " in last_line(run, refused)


@pytest.mark.soak
def test_ranks_that_wait_in_a_collective_for_ever_are_found_by_what_they_do_not_do(
    cluster: VirtualSlurm, recipe: Path, site: Path, submit: Callable[..., str]
) -> None:
    python = recipe.parent / "python"
    stuck = '[ "$SLURM_PROCID" = 1 ] && [ -z "$SLURM_RESTART_COUNT" ]'
    python.write_text(
        f'#!/bin/sh\nif {stuck}; then exec {sys.executable} -m tests.slurm.stuck_rank "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    site.write_text(site.read_text().replace(f"python: {sys.executable}", f"python: {python}"))
    job_id = submit("stuck", "training.steps=4", "training.stuck_after_s=15", "checkpoint.every=1")
    job = cluster.wait_for_job(job_id)
    run = recipe.parent / "runs" / "stuck"
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert [row[1:] for row in ended(run)] == [[job_id, "2", str(STUCK)], [job_id, "4", "0"]]
    log = (run / f"slurm-{job_id}.log").read_text()
    assert "END failed at step 2: ranks waited for each other in vain: node" in log
    assert "no progress in stage training for 1" in log
    logs = [(run / "attempts/1" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "stuck_rank.py" in logs[1] and "stuck_rank.py" not in logs[0]  # whose fault it was
    assert steps(run) == [1, 2, 3, 4]
