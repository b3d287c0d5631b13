"""Site files, and the exact files that a submission writes; bash is asked what it makes of them."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtpo_megatron.cluster import submission
from gtpo_megatron.cluster.record import job_ids, read_attempts
from gtpo_megatron.cluster.site import SITES, Site, load_site
from gtpo_megatron.cluster.submission import SCRIPTS, Job, script, seconds_of, write
from gtpo_megatron.errors import UserError

TEMPLATE = (SCRIPTS / "train.sbatch").read_text()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: Slurm's own opinion is asked in tests/slurm."""
    monkeypatch.setattr(submission.shutil, "which", lambda name: None)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        name="trial",
        run=tmp_path / "runs" / "trial",
        folder=tmp_path,
        nodes=4,
        ranks_per_node=8,
        gpus_per_node=8,
        time="04:00:00",
        retries=2,
        python="/opt/env/bin/python",
    )


def options_of(text: str) -> list[str]:
    """What sbatch reads: the lines before the first command."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    return [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]


def srun_of(text: str, tmp_path: Path) -> list[str]:
    """The words of srun, when the script is run with stand-ins for Slurm's programs and for modules."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$WORDS"\nenv >"$WORDS.env"\n')
    (programs / "srun").chmod(0o755)
    # a function of the shell, as on clusters
    text = text.replace("set -uo pipefail", 'set -uo pipefail\nmodule() { echo "$*" >>"$WORDS.modules"; }')
    (tmp_path / "job.sbatch").write_text(text)
    environ = {"PATH": f"{programs}:/usr/bin:/bin", "WORDS": str(tmp_path / "words"), "SLURM_JOB_ID": "9"}
    done = subprocess.run(
        ["bash", tmp_path / "job.sbatch"], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (tmp_path / "words").read_text().splitlines()


def a_site(**values: Any) -> Site:
    """Without screening: that is a step of its own, of which tests/cluster/test_screening.py knows."""
    return Site.model_validate({"screening_s": 0} | values)


def test_options_of_the_job_come_after_those_of_the_file(job: Job) -> None:
    site = a_site(account="a", partition="p", cpus_per_rank=12, stop_before_s=600, sbatch=["--exclusive"])
    options = options_of(script(job, site, job.run / "submissions" / "1", TEMPLATE))
    assert options[:5] == [
        "--job-name=gtpo",
        "--output=gtpo-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=USR1@300",
    ]
    assert options[5:] == [
        "--job-name=trial",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--signal=USR1@600",
        "--time=04:00:00",
        "--account=a",
        "--partition=p",
        f"--chdir={job.folder}",
        f"--output={job.run}/slurm-%j.log",
        "--exclusive",
    ]


def test_bare_nodes_with_modules_and_variables(job: Job, tmp_path: Path) -> None:
    site = a_site(modules=["cuda/13.0", "gcc"], interface="ib0", env={"NOTE": "it's $HOME; `date`", "N": 22})
    folder = write(job, site, "name: trial\n")
    words = srun_of((folder / "train.sbatch").read_text(), tmp_path)
    attempt = job.run / "attempts" / "1"
    assert words == [
        "--kill-on-bad-exit=0",
        "--wait=90",
        f"--output={attempt}/rank-%t.log",
        "/opt/env/bin/python",
        "-m",
        "gtpo_megatron",
        "train",
        f"{folder}/recipe.yaml",
    ]
    assert (tmp_path / "words.modules").read_text() == "load cuda/13.0\nload gcc\n"
    environ = (tmp_path / "words.env").read_text().splitlines()
    expected = {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "NOTE=it's $HOME; `date`", "N=22"}
    assert expected <= set(environ)
    written = {"train.sbatch", "convert.sbatch", "evaluate.sbatch", "lib.sh", "recipe.yaml", "site.yaml"}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / "recipe.yaml").read_text() == "name: trial\n"


def test_pyxis(job: Job, tmp_path: Path) -> None:
    image = "nvcr.io#nvidia/pytorch:25.10-py3"
    container = {"kind": "pyxis", "image": image, "mounts": [str(tmp_path), "/a:/b"]}
    folder = write(job, a_site(container=container), "")
    assert srun_of((folder / "train.sbatch").read_text(), tmp_path)[3:7] == [
        f"--container-image={image}",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={tmp_path}:{tmp_path},/a:/b",
        "/opt/env/bin/python",
    ]


def test_apptainer(job: Job, tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    container = {"kind": "apptainer", "image": str(image), "mounts": [str(tmp_path), "/a:/b"]}
    folder = write(job, a_site(container=container), "")
    words = srun_of((folder / "train.sbatch").read_text(), tmp_path)
    bind = f"{tmp_path},/a:/b"
    assert words[3:11] == [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        bind,
        "--pwd",
        str(tmp_path),
        str(image),
    ]
    without_gpus = replace(job, gpus_per_node=0)
    text = script(without_gpus, a_site(container=container), folder, TEMPLATE)
    assert "\nin_container=(apptainer exec --bind " in text


def test_a_missing_image_ends_the_job_with_one_line(job: Job, tmp_path: Path) -> None:
    container = {"kind": "apptainer", "image": str(tmp_path / "none.sif"), "mounts": [str(tmp_path)]}
    folder = write(job, a_site(container=container), "")
    done = subprocess.run(["bash", folder / "train.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "END mistake: this job needs a file: " in done.stdout.splitlines()[-1]
    assert "none.sif" in done.stdout


def test_a_folder_that_is_not_in_the_container_is_refused(job: Job, tmp_path: Path) -> None:
    container = {"kind": "pyxis", "image": "i", "mounts": [f"{tmp_path}:/elsewhere"]}
    with pytest.raises(UserError, match="container.mounts: the run's directory"):
        write(job, a_site(container=container), "")
    assert not (job.run / "submissions").exists()


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("5", 300),
        ("5:30", 330),
        ("01:00:05", 3605),
        ("1-2", 93_600),
        ("1-2:03", 93_780),
        ("1-02:03:04", 93_784),
        ("UNLIMITED", None),
        ("soon", None),
    ],
)
def test_time_limits_are_those_of_sbatch(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_a_time_limit_that_leaves_no_time_to_train_is_refused(job: Job) -> None:
    with pytest.raises(UserError, match="--time 4: 240 s, and a run is asked to save and stop 300 s before"):
        write(replace(job, time="4"), a_site(), "name: trial\n")
    assert not (job.run / "submissions").exists()


def test_what_slurm_refuses_leaves_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 'allocation failure: no such partition' >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(submission.shutil, "which", lambda name: str(programs / name))
    with pytest.raises(UserError, match="no such partition"):
        write(job, a_site(), "")
    assert list((job.run / "submissions").iterdir()) == []


def test_submissions_are_counted(job: Job) -> None:
    folders = [write(job, a_site(), "") for _ in range(11)]
    assert [folder.name for folder in folders] == [str(n) for n in range(1, 12)]
    for folder in folders:
        (folder / "job_id").write_text(f"{100 + int(folder.name)}\n")
    assert job_ids(job.run) == [str(n) for n in range(101, 112)]


@pytest.mark.parametrize("name", sorted(path.stem for path in SITES.glob("*.yaml")))
def test_worked_examples_load(name: str) -> None:
    assert load_site(name).container.kind == ("none" if name == "modules" else name)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"partion": "gpu"}, "site.yaml:1: partion: unknown key (value 'gpu'); did you mean partition?"),
        (
            {"container": {"kind": "pyxis", "img": "x"}},
            "site.yaml:3: container.img: unknown key (value 'x'); did you mean container.image?",
        ),
        ({"container": {"kind": "docker"}}, "site.yaml:2: container.kind: 'docker'"),
        ({"container": {"kind": "apptainer"}}, "container.kind: apptainer needs container.image"),
        ({"container": {"image": "x.sif"}}, "have no effect with container.kind: none"),
        ({"container": {"kind": "pyxis", "image": "x", "mounts": ["here"]}}, "absolute path, not here"),
        ({"gpus_per_node": 0}, "gpus_per_node: 0 needs ranks_per_node"),
        ({"sbatch": ["exclusive"]}, "starts with -, unlike 'exclusive'"),
        ({"stop_before_s": 5}, "site.yaml:1: stop_before_s: 5"),
    ],
)
def test_mistakes_in_a_site_file_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError) as error:
        load_site(str(path))
    assert message in str(error.value)


def test_an_unknown_site_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="apptainer, modules, pyxis"):
        load_site("nowhere")


@pytest.mark.parametrize(
    "rows, stuck",
    [
        (["9 0 1"], 1),
        (["9 5 1"], 0),
        (["9 5 1", "9 5 1", "9 5 137"], 2),
        (["9 5 1", "9 4 1", "9 6 1"], 0),  # a step that was made before is not new
        (["9 5 1", "9 4 1", "9 5 1"], 2),
        (["8 5 1", "8 5 1", "9 5 1"], 0),  # of a former job, which a person has submitted again
        (["9 0 term", "9 0 term", "9 0 3"], 1),
        (["9 10 1", "9 9 1"], 1),  # numbers, not words
    ],
)
def test_attempts_without_a_new_step(tmp_path: Path, rows: list[str], stuck: int) -> None:
    (tmp_path / "attempts").mkdir()
    ended = tmp_path / "attempts" / "ended"
    ended.write_text("".join(f"{n} {row}\n" for n, row in enumerate(rows, start=1)))
    count = f"source {SCRIPTS / 'lib.sh'}; attempts={tmp_path / 'attempts'}; attempts_without_a_step"
    done = subprocess.run(["bash", "-c", count], env={"SLURM_JOB_ID": "9"}, capture_output=True, text=True)
    assert done.stdout.strip() == str(stuck), done.stderr
    assert [attempt.number for attempt in read_attempts(tmp_path)] == list(range(1, len(rows) + 1))


def test_servers_in_the_job_are_more_nodes_of_it(job: Job) -> None:
    with_servers = replace(job, servers=2)
    text = script(with_servers, a_site(), job.run / "submissions" / "1", TEMPLATE)
    assert "--nodes=6" in options_of(text) and "\nservers=2\n" in text
    assert "serve.sbatch" not in submission.scripts_of(with_servers)


def test_a_heterogeneous_job_has_the_servers_as_its_second_component(job: Job) -> None:
    site = a_site(partition="p", cpus_per_rank=4, sbatch=["--mem=0"], sbatch_servers=["--partition=small"])
    het = replace(job, servers=2, spares=1, het=True)
    text = script(het, site, job.run / "submissions" / "1", TEMPLATE)
    asked = options_of(text)
    first, second = asked[: asked.index("hetjob")], asked[asked.index("hetjob") + 1 :]
    assert "--nodes=5" in first and "--partition=p" in first and "--partition=small" not in first
    assert second == [
        "--job-name=trial",
        "--requeue",
        "--ntasks-per-node=1",
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=32",
        "--time=04:00:00",
        "--partition=p",
        f"--chdir={job.folder}",
        f"--output={job.run}/slurm-%j.log",
        "--mem=0",
        "--partition=small",
    ]
    assert "\nservers=component\n" in text
    assert submission.scripts_of(het).keys() == {"train.sbatch", "convert.sbatch", "evaluate.sbatch"}


def test_spare_nodes_are_more_nodes_of_the_job(job: Job) -> None:
    text = script(
        replace(job, servers=2, spares=1), a_site(screening_s=45), job.run / "submissions" / "1", TEMPLATE
    )
    assert "--nodes=7" in options_of(text)
    assert "\nscreening=45\n" in text and "\nspares=1\n" in text


def test_servers_in_jobs_of_their_own_are_an_array(job: Job) -> None:
    site = a_site(partition="p", cpus_per_rank=4, sbatch=["--mem=0"], sbatch_servers=["--partition=preempt"])
    folder = write(replace(job, servers_jobs=3), site, "name: trial\n")
    assert "\nservers=jobs\n" in (folder / "train.sbatch").read_text()
    assert "--nodes=4" in options_of((folder / "train.sbatch").read_text())
    asked = options_of((folder / "serve.sbatch").read_text())
    assert asked[asked.index("--job-name=trial-serve") :] == [
        "--job-name=trial-serve",
        "--array=1-3",
        "--nodes=1",
        "--gpus-per-node=8",
        "--cpus-per-task=32",
        "--time=04:00:00",
        "--partition=p",
        f"--chdir={job.folder}",
        f"--output={job.run}/slurm-%j.log",
        "--mem=0",
        "--partition=preempt",
    ]
    assert submission.commands(folder) == [
        ["sbatch", "--parsable", f"{folder}/{name}"] for name in ("train.sbatch", "serve.sbatch")
    ]


@pytest.mark.parametrize("tensor, servers, expected", [(2, 1, 4), (8, 1, 1), (3, 1, 2), (2, 3, 3)])
def test_a_node_has_as_many_servers_as_it_has_gpus_for(
    job: Job, tensor: int, servers: int, expected: int
) -> None:
    settings = submission.servers_settings(job, tensor, servers)
    assert settings == [
        f"rollout.sglang.urls_dir={job.run}/servers",
        f"rollout.sglang.servers={expected}",
    ]


def test_a_server_larger_than_a_node_is_a_mistake(job: Job) -> None:
    with pytest.raises(UserError, match="rollout.sglang.tensor: 16, but a node has 8 GPUs"):
        submission.servers_settings(job, 16, 1)


def test_the_key_of_servers_is_made_once_and_is_for_its_owner(tmp_path: Path) -> None:
    ask = f'source {SCRIPTS / "lib.sh"}; servers_key {tmp_path}; echo "$GTPO_SERVERS_KEY"'
    keys = [subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout for _ in range(2)]
    assert keys[0] == keys[1] and len(keys[0].strip()) == 48 and keys[0].strip().isalnum()
    assert [path.name for path in (tmp_path / "servers").iterdir()] == [".key"]
    assert (tmp_path / "servers" / ".key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "convert.sbatch",
            ["convert", "megatron-to-hf", "{run}/checkpoints/latest", "{run}/converted", "--x"],
        ),
        ("scaling.sbatch", ["scaling-report", "{run}", "--x"]),
        (
            "evaluate.sbatch",
            [
                "evaluate",
                "{folder}/recipe.yaml",
                "rollout.engine=embedded",
                "parallel.tensor=1",
                "parallel.pipeline=1",
                "parallel.virtual_pipeline=",
                "parallel.context=1",
                "parallel.expert=1",
                "parallel.sequence=false",
                "model.path={run}/checkpoints/latest",
                "--x",
            ],
        ),
    ],
)
def test_commands_after_a_run_have_its_facts(job: Job, tmp_path: Path, name: str, words: list[str]) -> None:
    folder = write(job, a_site(partition="p"), "name: trial\n", [name])
    text = (folder / name).read_text()
    asked = options_of(text)
    assert asked[asked.index("--no-requeue") + 1 :][:5] == [
        "--job-name=trial",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--time=04:00:00",
    ]
    text = text.replace("set -uo pipefail", "set -uo pipefail; set -- --x")  # as a word of sbatch
    found = srun_of(text, tmp_path)
    expected = [word.format(run=job.run, folder=folder) for word in words]
    assert found[found.index("gtpo_megatron") + 1 :] == expected


def test_the_trained_policy_is_evaluated_where_it_was_exported(job: Job, tmp_path: Path) -> None:
    folder = write(job, a_site(), "name: trial\n")
    (job.run / "hf").mkdir()
    assert f"model.path={job.run}/hf" in srun_of((folder / "evaluate.sbatch").read_text(), tmp_path)


def test_a_sweep_is_an_array_whose_elements_run_the_scripts_of_its_runs(job: Job, tmp_path: Path) -> None:
    runs = [replace(job, run=tmp_path / "runs" / name) for name in ("a b", "c")]
    folders = [write(run, a_site(), "name: trial\n") for run in runs]
    of_array = replace(job, name="both", run=tmp_path / "runs" / "both.sweep")
    folder = submission.write_array(of_array, a_site(), folders, at_once=1)
    text = (folder / "array.sbatch").read_text()
    assert {"--job-name=both", "--array=0-1%1", "--requeue", "--signal=USR1@300"} <= set(options_of(text))
    assert options_of(text)[-1] == f"--output={of_array.run}/slurm-%A_%a.log"
    for folder in folders:
        (folder / "train.sbatch").write_text(f'echo "{folder}" "$@"')
    for index, expected in enumerate(folders):
        environ = {"SLURM_ARRAY_TASK_ID": str(index), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "-c", text, "array", "more"], env=environ, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{expected} more\n"
