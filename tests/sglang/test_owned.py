"""Servers that the trainer starts: restarted when killed, ended when the trainer is, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from gtpo_megatron.config import RolloutConfig, SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.rollout.sglang import SGLangEngine
from gtpo_megatron.rollout.sglang.servers import launch
from gtpo_megatron.rollout.sglang.servers.launch import WATCHDOG, make_launch

ROOT = Path(__file__).parents[2]


@pytest.mark.sglang
@pytest.mark.soak
def test_a_killed_server_is_restarted_and_all_end_with_the_trainer(
    sglang_python: str, checkpoint: Path, tmp_path: Path
) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tests.sglang.owned", str(checkpoint), sglang_python, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OWNED_KEY": "a-secret"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        first = _line(trainer)
        family = psutil.Process(trainer.pid).children(recursive=True)
        assert any("sglang" in name for name in map(_command, family))
        assert not any("a-secret" in _command(process) for process in family)
        for url in first[3:]:  # the server and the router
            ask = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
            assert httpx.post(f"{url}/generate", json=ask, timeout=30).status_code == 401
        next(p for p in family if _command(p).startswith("sglang::scheduler")).send_signal(signal.SIGKILL)
        url, router = first[3:]
        while url == first[3] or router == "None":
            number, completions, url, router = _line(trainer)[1:]
        assert router == first[4]
        assert int(number) > int(first[1])
        assert completions == "4"
        family = psutil.Process(trainer.pid).children(recursive=True)
        assert len(family) > 2
    finally:
        trainer.kill()
        trainer.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def _line(trainer: subprocess.Popen[str]) -> list[str]:
    assert trainer.stdout is not None
    line = trainer.stdout.readline()
    assert line, "the trainer ended"
    return line.split()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_the_watchdog_ends_the_whole_tree_with_its_owner(tmp_path: Path) -> None:
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); time.sleep(600)"
    owner = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', {str(WATCHDOG)!r}, str(os.getpid()), sys.executable, '-c', {deaf!r}],"
        " start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", owner])
    deadline = time.monotonic() + 20
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for (
        member
    ) in family:  # as Slurm does, which asks all processes of a step to stop: the owner says what ends
        member.send_signal(signal.SIGUSR1)
    ended, _ = psutil.wait_procs(family, timeout=0.5)
    assert ended == []
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_a_trainer_that_ends_by_an_error_ends_its_servers(checkpoint: Path, tmp_path: Path) -> None:
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    python.chmod(0o755)
    trainer = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gtpo_megatron.config import SGLangConfig\n"
        "from gtpo_megatron.rollout.sglang import SGLangEngine\n"
        f"config = SGLangConfig(python={str(python)!r})\n"
        f"engine = SGLangEngine(config, {str(checkpoint)!r}, 'fp32', Path({str(tmp_path)!r}), 'cpu')\n"
        f"while not Path({str(pid)!r}).exists():\n"
        "    time.sleep(0.05)\n"
        "sys.exit('a mistake')\n"
    )
    ended = subprocess.run([sys.executable, "-c", trainer], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("a mistake\n")
    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_server_that_cannot_start_is_an_error_with_its_log(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module: sglang >&2\nexit 1\n")
    python.chmod(0o755)
    config = SGLangConfig(python=str(python), start_timeout_s=30)
    engine = SGLangEngine(config, str(checkpoint), "fp32", tmp_path / "logs", "cpu")
    try:
        with pytest.raises(UserError, match="did not start(.|\n)*sglang-0.log(.|\n)*no such module: sglang"):
            engine.update_weights([], 0)
    finally:
        engine.close()


def test_what_cannot_work_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = str(Path(sys.executable))
    for host in ("0.0.0.0", "10.1.2.3", "node1"):
        with pytest.raises(UserError, match=f"host: {host} .*api_key"):
            make_launch(SGLangConfig(host=host, python=python), "m", "fp32", "cpu", tmp_path)
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(UserError, match="NO_KEY is not set"):
        make_launch(SGLangConfig(python=python, api_key="env:NO_KEY"), "m", "fp32", "cpu", tmp_path)
    with pytest.raises(UserError, match=r"rollout.sglang.python: .*setup_sglang_env.sh"):
        make_launch(SGLangConfig(python=str(tmp_path / "python")), "m", "fp32", "cpu", tmp_path)
    assert make_launch(SGLangConfig(host="::1", python=python), "m", "fp32", "cpu", tmp_path).api_key is None


def test_every_server_gets_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launch, "_start", lambda command, *_: started.append(command))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for config in (SGLangConfig(servers=3, tensor=2), SGLangConfig(servers=2, first_gpu=0)):
        config = config.model_copy(update={"python": sys.executable})
        made = make_launch(config, "m", "bf16", "cuda", tmp_path)
        for index in range(config.servers):
            made.server(index)
    assert [command[command.index("--base-gpu-id") + 1] for command in started] == ["2", "4", "6", "0", "1"]
    assert all("--enable-memory-saver" not in command for command in started)


def test_servers_that_share_gpus_can_give_up_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        launch, "_start", lambda command, environment, _: started.append((command, environment))
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    section = SGLangConfig(servers=2, tensor=2, memory_share=0.7, python=sys.executable)
    config = RolloutConfig(engine="sglang", placement="together", sglang=section).servers
    made = make_launch(config, "m", "bf16", "cuda", tmp_path, together=True)
    for index in range(config.servers):
        made.server(index)
    for index, (command, environment) in enumerate(started):
        assert command[command.index("--base-gpu-id") + 1] == str(2 * index)  # where ranks are
        assert command[command.index("--mem-fraction-static") + 1] == "0.7"
        assert "--enable-memory-saver" in command
        assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert len(started) == 2


def test_an_evaluation_has_the_gpus_of_a_trainer_that_is_not_there() -> None:
    section = SGLangConfig(servers=8, weight_transfer="tensor")
    alone = RolloutConfig(engine="sglang", placement="together", sglang=section).alone
    assert (alone.placement, alone.sglang.weight_transfer) == ("apart", "distributed")
    assert alone.sglang.gpus(local_ranks=1) == range(8)
    apart = RolloutConfig(engine="sglang", sglang=section)
    assert apart.alone is apart
