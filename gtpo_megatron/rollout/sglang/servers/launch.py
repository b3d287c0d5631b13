"""SGLang's processes on this machine: command lines, start, logs, and an end that cannot be forgotten."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gtpo_megatron import processes
from gtpo_megatron.config import SGLangConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.network import is_loopback

Device = Literal["cpu", "cuda"]
STUBS = Path(__file__).parents[1] / "cpu_stubs"
WATCHDOG = Path(processes.__file__)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
KEY_VARIABLE = "GTPO_SGLANG_API_KEY"
# The key travels in the environment: a command line can be read by every user of the machine.
WITH_KEY = (
    f"import os, runpy, sys; sys.argv = sys.argv[1:] + ['--api-key', os.environ.pop('{KEY_VARIABLE}')]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *(
        "--grammar-backend",
        "none",
        "--cuda-graph-backend-decode=disabled",
        "--cuda-graph-backend-prefill=disabled",
    ),
    *("--max-total-tokens", "16384", "--sleep-on-idle"),
)


@dataclass
class Process:
    """A watched process: its group is ended with the trainer's end."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        """Whether the command still runs."""
        return self.popen.poll() is None

    def tail(self, lines: int = 15) -> str:
        """The log's last lines, for messages."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Kill the process and its children. A stopped (SIGSTOP) process is killed as well."""
        processes.kill_group(self.popen.pid)
        self.popen.wait()


def end_all(family: Sequence[Process], grace_s: float) -> None:
    """Let all processes end by themselves; kill those that have not done so after `grace_s`, and their children."""
    deadline = time.monotonic() + grace_s
    for process in family:
        process.popen.terminate()
    for process in family:
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        process.end()


@dataclass(frozen=True)
class Launch:
    """What it takes to start one server of a run again and again."""

    config: SGLangConfig
    python: str
    model_path: str
    dtype: Literal["bf16", "fp32"]
    device: Device
    log_dir: Path
    api_key: str | None
    together: bool = False  # on the trainer's GPUs, with memory that can be given up

    def server(self, index: int, port: int | None = None) -> tuple[Process, str]:
        """Start server `index`, by default on a free port. Returns the process and its URL; it is not ready yet."""
        port = port or free_port(self.config.host)
        process = _start(
            self._command("sglang.launch_server", self._server_args(index, port)),
            self._environment(),
            self.log_dir / f"sglang-{index}.log",
        )
        return process, f"http://{_reachable(self.config.host)}:{port}"

    def router(self) -> tuple[Process, str]:
        """Start sglang-router, without workers, on a free port. Returns the process and its URL."""
        port = free_port(self.config.host)
        args = [
            *("--host", self.config.host, "--port", str(port), "--policy", "cache_aware"),
            *("--request-timeout-secs", str(int(self.config.request_timeout_s) + 1)),
            # The project retries itself, and must see every failure to tell a dead server from a bad answer.
            *("--disable-retries", "--disable-circuit-breaker", "--log-level", "warn"),
            *("--prometheus-port", str(free_port("127.0.0.1"))),
        ]
        process = _start(
            self._command("sglang_router.launch_router", args),
            self._environment(),
            self.log_dir / "sglang-router.log",
        )
        return process, f"http://{_reachable(self.config.host)}:{port}"

    def _command(self, module: str, args: list[str]) -> list[str]:
        if self.api_key is None:
            return [self.python, "-m", module, *args]
        return [self.python, "-c", WITH_KEY, module, *args]

    def _server_args(self, index: int, port: int) -> list[str]:
        config = self.config
        own = CPU_ARGS  # where there is no memory to give up, a server answers all the same
        if self.device == "cuda":
            own = ("--base-gpu-id", str(first_gpu(config, index)))
            own += ("--enable-memory-saver",) if self.together else ()
            own += ("--mem-fraction-static", str(config.memory_share)) if config.memory_share else ()
        return [
            *("--model-path", self.model_path, "--host", config.host, "--port", str(port)),
            *("--dtype", DTYPES[self.dtype], "--tp-size", str(config.tensor)),
            # A line per request would fill a disk in a week.
            *("--log-level-http", "warning", "--max-running-requests", str(config.concurrency)),
            *own,
            *config.args,
        ]

    def _environment(self) -> dict[str, str]:
        # torchrun's variables describe the trainer's ranks; a server that reads them would try to join.
        ours = (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "PYTHONPATH",
        )
        environment = {
            k: v for k, v in os.environ.items() if k not in ours and not k.startswith("TORCHELASTIC_")
        }
        if self.device == "cpu":
            environment |= {
                "PYTHONPATH": str(STUBS),
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TORCHDYNAMO_DISABLE": "1",  # would look for a compiler in the stand-in for triton
            }
            environment.setdefault("OMP_NUM_THREADS", "1")
            if self.config.tensor > 1:
                environment.setdefault(
                    "SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, range(self.config.tensor)))
                )
        if self.together:  # the trainer's, maybe of growing segments, which the memory saver does not go with
            environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
            environment.pop("PYTORCH_ALLOC_CONF", None)
        if self.api_key is not None:
            environment[KEY_VARIABLE] = self.api_key
        return environment


def make_launch(
    config: SGLangConfig,
    model_path: str,
    dtype: Literal["bf16", "fp32"],
    device: Device,
    log_dir: Path,
    *,
    together: bool = False,
) -> Launch:
    """Check what can be checked before a server is started.

    Raises:
        UserError: no interpreter of SGLang's environment, or a host that others can reach without an API key.
    """
    key = resolve_key(config.api_key)
    if key is None and not is_loopback(config.host):
        raise UserError(
            f"rollout.sglang.host: {config.host} is not a loopback address, and rollout.sglang.api_key is not set: "
            "anyone who reaches the port could replace the weights. Set api_key: env:NAME, or host: 127.0.0.1."
        )
    python = Path(config.python or Path.cwd() / ".venv-sglang" / "bin" / "python")
    if not python.exists():
        raise UserError(
            f"rollout.sglang.python: {python} does not exist; make SGLang's environment with "
            "tools/setup_sglang_env.sh, or name its interpreter"
        )
    log_dir.mkdir(parents=True, exist_ok=True)
    return Launch(config, str(python), model_path, dtype, device, log_dir, key, together)


def first_gpu(config: SGLangConfig, index: int) -> int:
    """The GPU of the first rank of the server that is started here as number `index`."""
    return config.gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))[index * config.tensor]


def resolve_key(key: str | None) -> str | None:
    """The API key, read from the environment where it is given as env:NAME.

    Raises:
        UserError: the variable is not set.
    """
    if key is None or not key.startswith("env:"):
        return key
    if not os.environ.get(key[4:]):
        raise UserError(f"rollout.sglang.api_key: {key}: the environment variable {key[4:]} is not set")
    return os.environ[key[4:]]


def free_port(host: str) -> int:
    """A port that is free now. Another process may take it before the server does: the server then ends and is restarted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _start(command: list[str], environment: dict[str, str], log: Path) -> Process:
    with log.open("ab") as out:
        popen = subprocess.Popen(
            [sys.executable, "-I", str(WATCHDOG), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Process(popen, log)
