"""Servers for a run elsewhere: a stand-in answers in SGLang's place, so that only their keeping is tested here."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtpo_megatron.errors import COMPLETE, MISTAKE, STOPPED
from gtpo_megatron.registry import Server, registered
from gtpo_megatron.run.directory import Owner

ROOT = Path(__file__).parents[2]
STAND_IN = """\
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
print("arguments", *sys.argv, flush=True)
http.server.HTTPServer(("0.0.0.0", port), Answer).serve_forever()
"""
Serving = subprocess.Popen[str]


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    (tmp_path / "server.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/server.py "$@"\n')
    python.chmod(0o755)
    sglang = {
        "urls_dir": str(tmp_path / "servers"),
        "api_key": "secret",
        "servers": 2,
        "python": str(python),
        "start_timeout_s": 60,
    }
    values: dict[str, Any] = {
        "name": "run",
        "dir": str(tmp_path),
        "model": {"path": str(tiny_checkpoint("llama")), "dtype": "fp32"},
        "data": {"path": "prompts.jsonl"},
        "training": {"steps": 1},
        "rewards": {"terms": [{"kind": "paper_correctness"}]},
        "rollout": {"engine": "sglang", "sglang": sglang},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def serving(recipe: Path) -> Iterator[Serving]:
    """`gtpo-megatron serve` of the recipe, under way."""
    command = [sys.executable, "-m", "gtpo_megatron", "serve", recipe, "--host", "localhost"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    yield process
    process.terminate()
    process.communicate(timeout=60)


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def servers(recipe: Path, number: int = 2) -> list[Server]:
    """Those that are registered, once there are so many; else none."""
    found = registered(recipe.parent / "servers")
    return found if len(found) == number else []


def wait_until_up(recipe: Path, serving: Serving) -> list[Server]:
    until(lambda: servers(recipe) or serving.poll() is not None)
    assert serving.poll() is None, serving.stderr.read()
    return servers(recipe)


def log(recipe: Path, name: str) -> str:
    return (recipe.parent / "run" / "logs" / "localhost" / name).read_text()


def test_servers_register_are_started_again_and_take_their_leave(recipe: Path, serving: Serving) -> None:
    first = wait_until_up(recipe, serving)
    assert {server.pid for server in first} == {serving.pid}
    assert all(server.url.startswith("http://localhost:") for server in first)
    assert "--port" in (arguments := log(recipe, "sglang-0.log")) and "secret" not in arguments
    group = subprocess.run(["pgrep", "-f", f"{recipe.parent}/server.py"], capture_output=True, text=True)
    os.kill(int(group.stdout.split()[-1]), signal.SIGKILL)
    second = until(lambda: {s.url for s in servers(recipe)} ^ {s.url for s in first} and servers(recipe))
    assert len({s.url for s in second} & {s.url for s in first}) == 1  # the other one was left alone
    assert "ended; started again" in log(recipe, "serve.log")

    serving.send_signal(signal.SIGUSR1)  # is for ranks
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(60) == STOPPED
    assert list((recipe.parent / "servers").iterdir()) == []
    left = subprocess.run(["pgrep", "-f", f"{recipe.parent}/server.py"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.parametrize(
    "exit_code, message", [(COMPLETE, ""), (MISTAKE, "has ended, so its servers do: no such file")]
)
def test_servers_end_with_their_run(recipe: Path, serving: Serving, exit_code: int, message: str) -> None:
    wait_until_up(recipe, serving)
    owner = Owner(recipe.parent / "run", steps=1)
    owner.end(ValueError("no such file") if exit_code else None, exit_code)
    assert serving.wait(60) == exit_code
    assert message in serving.stderr.read()
    assert list((recipe.parent / "servers").iterdir()) == []
