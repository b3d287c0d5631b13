"""What slurm/lib.sh makes of the nodes' answers, with stand-ins for Slurm's programs; on a real Slurm: tests/slurm."""

import subprocess
from pathlib import Path

import pytest

from gtpo_megatron.cluster.submission import SCRIPTS

SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" >"$STATE/words.$$" # of each step, for two of them run at once
case " $* " in *' --het-group=1 '*) exit ;; esac # one for both components
while [ "$1" != gtpo_megatron.machine.screen ]; do shift; done
folder=$2 token=$3 now=$(date +%s)
fit() { echo "screen $1 $now ok fine"; echo "$token" >"$folder/$1"; }
cut() { echo "screen $1 $now cut $2 no answer"; }
source "$STATE/answers"
"""
SCONTROL = """\
#!/bin/bash
case "$*" in
  'show hostnames of-servers') echo n5 ;;
  'show hostnames '*) printf 'n%s\\n' 1 2 3 4 ;;
  *'show job'*) echo "JobId=9 ExcNodeList=$(cat "$STATE/left_out" 2>/dev/null || echo '(null)') End" ;;
  *) echo "$*" >>"$STATE/calls" ;;
esac
"""
SBATCH = '#!/bin/bash\necho "$*" >>"$STATE/tests"\nexit "$(cat "$STATE/impossible" 2>/dev/null || echo 0)"\n'
JOB = """\
set -uo pipefail
source {library}
retries=1
begin_attempt {run}
screen_nodes {spares} 30 --container-image=x python3
echo "fit ${{fit[*]}}${{fit_servers:+ and ${{fit_servers[*]}}}}"
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def screened(state: Path, answers: str, spares: int = 0, **more: str) -> tuple[int, list[str]]:
    """The exit code and the lines of the job, without their times, after the first."""
    (state / "answers").write_text(answers)
    environ = {
        "PATH": f"{state}:/usr/bin:/bin",
        "STATE": str(state),
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_NNODES": "4",
        "SLURM_JOB_PARTITION": "gpu",
        **more,
    }
    text = JOB.format(library=SCRIPTS / "lib.sh", run=state / "run", spares=spares)
    done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    lines = done.stdout.splitlines()[1:]
    return done.returncode, [line if line.startswith("fit") else line.split(" ", 2)[2] for line in lines]


def calls(state: Path, name: str = "calls") -> list[str]:
    file = state / name
    return file.read_text().splitlines() if file.exists() else []


def asked(state: Path) -> str:
    """The words of each `srun`, a line each."""
    return "".join(file.read_text() for file in state.glob("words.*"))


def test_all_are_fit_and_one_step_has_asked_them(state: Path) -> None:
    assert screened(state, "for n in 1 2 3 4; do fit n$n; done") == (0, ["fit n1 n2 n3 n4"])
    words = asked(state).splitlines()
    assert words[:3] == ["--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert words[5:8] == ["--container-image=x", "python3", "-m"]
    assert words[-6:] == ["--limit", "30", "--meet", "n1:20063", "--nodes", "4"]  # 63: of the job's number
    assert calls(state) == []


def test_spare_nodes_that_nobody_needs_are_left_idle(state: Path) -> None:
    assert screened(state, "for n in 1 2 3 4; do fit n$n; done", spares=1) == (0, ["fit n1 n2 n3"])


@pytest.mark.parametrize(
    "of_n2, why",
    [
        ('echo "screen n2 $now unfit GPU 3 is not idle"', "GPU 3 is not idle"),
        ("echo 'srun: error: n2: task 1: Killed' >&2", "no answer: srun: error: n2: task 1: Killed"),
        ("echo 'n2 is fine'", "no answer: "),
        ('fit n2 | sed "s/$now/$((now - 3600))/"', "its clock and that of HERE differ by -36"),
        ("fit n2; rm $folder/n2", "what it writes into the run's directory is not seen by HERE"),
        ("fit n2; echo other >$folder/n2", "what it writes into the run's directory is not seen by HERE"),
    ],
    ids=["says so", "killed", "no answer", "clock", "not seen", "another file"],
)
def test_a_spare_node_takes_the_place_of_an_unfit_one(state: Path, of_n2: str, why: str) -> None:
    code, (said, fit) = screened(state, f"fit n1; fit n3; fit n4\n{of_n2}", spares=1)
    here = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    assert (code, fit) == (0, "fit n1 n3 n4")
    assert said.startswith(f"n2 is unfit: {why.replace('HERE', here)}")


def test_too_few_are_fit_and_the_job_goes_elsewhere(state: Path) -> None:
    (state / "left_out").write_text("n9")
    code, said = screened(state, 'fit n1; fit n3\necho "screen n2 $now unfit no GPU"', spares=1)
    assert code == 0
    assert said[:2] == ["n2 is unfit: no GPU", "n4 is unfit: no answer: "]
    assert said[-1].startswith(
        "END failed at step 0: 2 of 4 nodes are unfit, 1 to spare: n2: no GPU; logs in "
    )
    assert said[-1].endswith("; requeued without n2,n4")
    assert calls(state) == ["requeue 9", "update jobid=9 excnodelist=n9,n2,n4"]
    (test,) = calls(state, "tests")
    assert test.startswith("--test-only --exclude=n9,n2,n4 --nodes=4 --partition=gpu ")
    assert (state / "run" / "attempts" / "ended").read_text() == "1 9 0 unfit\n"


def test_too_few_are_fit_and_slurm_has_no_others(state: Path) -> None:
    (state / "impossible").write_text("1")
    code, said = screened(state, 'for n in 1 2 3; do fit n$n; done\necho "screen n4 $now unfit no GPU"')
    assert code == 2
    assert said[-1] == (
        "END mistake: 1 of 4 nodes are unfit, 0 to spare: n4: no GPU; Slurm has too few nodes without n4: not requeued"
    )
    assert calls(state) == []


def test_what_all_nodes_share_is_a_mistake(state: Path) -> None:
    code, said = screened(state, 'for n in 1 2 3 4; do echo "screen n$n $now unfit no ib0"; done')
    assert code == 2
    assert said[-1] == "END mistake: 4 of 4 nodes are unfit, 0 to spare: n1: no ib0; not requeued"
    assert calls(state) == []


def test_a_job_that_is_asked_to_stop_meanwhile_goes_on_another_day(state: Path) -> None:
    code, said = screened(state, 'for n in 1 2 3; do fit n$n; done\necho "screen n4 $now stopped SIGUSR1"')
    assert (code, said) == (0, ["END stopped after step 0; requeued"])
    assert (state / "run" / "attempts" / "ended").read_text() == "1 9 0 3\n"


ALL_FIT = "for n in 1 2 3 4; do fit n$n; done\n"


@pytest.mark.parametrize(
    "cuts, unfit, of, peer",
    [
        ("cut n1 n3; cut n2 n3; cut n4 n3", "n3", 3, "n1"),
        ("cut n3 n1; cut n3 n2; cut n3 n4", "n3", 3, "n1"),  # says so itself
        ("cut n1 n3; cut n3 n1", "n3", 1, "n1"),  # nothing tells which of the two it is
        ("cut n2 n1; cut n1 n2; cut n1 n4", "n1", 2, "n2"),
    ],
    ids=["the others say so", "it says so", "a pair", "the first node"],
)
def test_a_spare_takes_the_place_of_one_that_others_do_not_reach(
    state: Path, cuts: str, unfit: str, of: int, peer: str
) -> None:
    code, lines = screened(state, ALL_FIT + cuts, spares=1)
    left = [name for name in ("n1", "n2", "n3", "n4") if name != unfit]
    assert code == 0 and lines[-1] == f"fit {' '.join(left)}"
    assert lines[0].startswith(f"{unfit} is unfit: it and {of} of 3 other nodes do not reach each other: n")
    assert lines[0].endswith(": no answer") and len(lines) == 2


def test_links_of_a_node_that_is_unfit_anyway_are_no_ones_fault(state: Path) -> None:
    answers = 'fit n1; fit n3; fit n4; cut n1 n2; cut n3 n2\necho "screen n2 $now unfit no GPU"'
    assert screened(state, answers, spares=1) == (0, ["n2 is unfit: no GPU", "fit n1 n3 n4"])


def test_two_nodes_apart_of_a_job_without_spares_go_on_without_the_later(state: Path) -> None:
    code, said = screened(state, ALL_FIT + "cut n2 n3")
    assert code == 0 and said[-1].endswith("; requeued without n3")


def test_nodes_of_which_no_two_reach_each_other_have_that_in_common(state: Path) -> None:
    cuts = "; ".join(f"cut n{a} n{b}" for a in range(1, 5) for b in range(1, 5) if a != b)
    code, said = screened(state, ALL_FIT + cuts)
    assert code == 2
    assert said[-1].startswith("END mistake: no two nodes reach each other: n2: it and ")
    assert calls(state) == []


HET = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "of-ranks",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "of-servers",
}


def test_components_are_asked_by_a_step_each_and_spares_are_for_ranks_alone(state: Path) -> None:
    answers = "fit n1; fit n2; fit n3; fit n5; cut n1 n4"
    code, said = screened(state, f"{ALL_FIT}{answers}", spares=1, **HET)
    assert (code, said[-1]) == (0, "fit n1 n2 n3 and n5")
    words = asked(state)
    assert words.count("--het-group=0\n") == words.count("--het-group=1\n") == 1
    assert words.count("--nodes=4\n--ntasks=4\n") == words.count("--nodes=1\n--ntasks=1\n") == 1
    assert words.count("n1:20063\n--nodes\n5\n") == 2

    code, said = screened(state, f'{ALL_FIT}echo "screen n5 $now unfit no GPU"', spares=1, **HET)
    assert code == 0 and said[-1].endswith("; requeued without n5")
    assert calls(state, "tests")[0].startswith("--test-only --exclude=n5 ")  # not for one component


PLACES = """\
set -uo pipefail
source {library}
fit=() fit_servers=()
place_steps {servers} {spares}
printf '%s\\n' "ranks ${{of_ranks[*]}}" "servers ${{of_servers[*]}}"
"""


@pytest.mark.parametrize(
    "servers, spares, environ, ranks, of_servers",
    [
        ("0", 0, {}, "", ""),
        ("jobs", 0, {}, "", ""),
        ("0", 1, {}, "--nodelist=n1,n2,n3,n4 --nodes=4 --ntasks=8", ""),
        (
            "1",
            0,
            {"SLURM_CPUS_PER_TASK": "3"},
            "--nodelist=n2,n3,n4 --nodes=3 --ntasks=6",
            "--nodelist=n1 --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=6",
        ),
        (
            "component",
            0,
            {**HET, "SLURM_CPUS_PER_TASK_HET_GROUP_1": "5", "SLURM_NTASKS_PER_NODE_HET_GROUP_0": "2"},
            "--het-group=0 --nodelist=n1,n2,n3,n4 --nodes=4 --ntasks=8",
            "--het-group=1 --nodelist=n5 --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=5",
        ),
    ],
    ids=["all train", "jobs", "spares", "first", "component"],
)
def test_places_of_ranks_and_servers(
    state: Path, servers: str, spares: int, environ: dict[str, str], ranks: str, of_servers: str
) -> None:
    text = PLACES.format(library=SCRIPTS / "lib.sh", servers=servers, spares=spares)
    known = {"PATH": f"{state}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-4]"}
    known |= environ if environ.get("SLURM_HET_SIZE") else {"SLURM_NTASKS_PER_NODE": "2", **environ}
    done = subprocess.run(["bash", "-c", text], env=known, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"ranks {ranks}", f"servers {of_servers}"], done.stderr


def test_servers_without_their_component_are_a_mistake(state: Path) -> None:
    text = PLACES.format(library=SCRIPTS / "lib.sh", servers="component", spares=0)
    environ = {"PATH": f"{state}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-4]"}
    done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and "END mistake: this job has no second component" in done.stdout
