"""`rollout.sglang`: the servers."""

import math
import re
from typing import Any, Literal

from pydantic import Field, field_validator

from gtpo_megatron.config.section import Section


class SGLangConfig(Section):
    """SGLang servers: given by URL, or started by the trainer on this machine."""

    urls: tuple[str, ...] = Field((), description="servers that already run")
    urls_file: str | None = Field(None, description="file with one URL a line; read again when it changes")
    urls_dir: str | None = Field(
        None, description="folder in which servers register themselves (`serve`); they may come and go"
    )
    servers: int = Field(
        1,
        ge=1,
        le=10_000,
        description="servers to start here when no URLs are given; by `serve`, on each node",
    )
    tensor: int = Field(1, ge=1, le=10_000, description="tensor parallelism of each started server")
    first_gpu: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="GPU of the first started server; default: the first that no rank here has; with placement: together, 0",
    )
    memory_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the GPU memory that a started server finds free for weights and cache; default: SGLang's own, "
        "some 0.88",
    )
    python: str | None = Field(
        None, description="interpreter of SGLang's environment; default: .venv-sglang/bin/python"
    )
    router: bool = Field(False, description="put sglang-router before the servers for /generate")
    host: str = Field("127.0.0.1", description="address that started servers listen on")
    api_key: str | None = Field(None, description="needed when host is not loopback; may be env:NAME")
    start_timeout_s: float = Field(
        600.0, gt=0, le=604_800, description="how long a server may take to answer at first"
    )
    request_timeout_s: float = Field(
        600.0, gt=0, le=604_800, description="limit for one completion's request"
    )
    concurrency: int = Field(64, ge=1, le=100_000, description="completions in flight per server")
    weight_transfer: Literal["distributed", "tensor", "disk"] = Field(
        "distributed", description="by a process group, in the request (or CUDA IPC), or through files"
    )
    bucket_mb: int = Field(512, ge=1, le=1_000_000, description="size of a transfer bucket, MiB")
    verify_every: int = Field(
        10,
        ge=0,
        le=1_000_000_000,
        description="mismatch certificate every K weight versions; 0: only after start",
    )
    checksums: Literal["never", "start", "certificate"] = Field(
        "start",
        description="compare each of the servers' tensors with the trainer's after start, or with every certificate; "
        "the servers read them from the run's directory",
    )
    max_logprob_gap: float | None = Field(
        None, gt=0, le=100, description="stop above this mean |difference|; default by dtype"
    )
    group_timeout_s: float | None = Field(
        None, gt=0, le=604_800, description="a group not done by then is aborted and recycled"
    )
    partial: bool = Field(
        False, description="continue completions after an update, a timeout or the end of their batch"
    )
    quorum: int | str = Field(
        1,
        description="servers, by number or as a share (`75%`), that must have an update before sampling goes on; "
        "the others are brought to it later",
    )
    no_server_timeout_s: float = Field(
        600.0,
        gt=0,
        le=604_800,
        description="how long to wait with no server left, or fewer than `quorum`, before saving and stopping",
    )
    args: tuple[str, ...] = Field((), description="further arguments of sglang.launch_server")

    @field_validator("quorum", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> Any:
        share = re.fullmatch(r"(\d+)%", value) if isinstance(value, str) else None
        if not (1 <= int(share[1]) <= 100 if share else type(value) is int and 1 <= value <= 10_000):
            raise ValueError(
                "must be a number of servers from 1 to 10000, or a share of them from 1% to 100%"
            )
        return value

    def needed(self, servers: int) -> int:
        """How many of so many servers `quorum` asks for."""
        if isinstance(self.quorum, int):
            return self.quorum
        return max(1, math.ceil(servers * int(self.quorum[:-1]) / 100))

    @property
    def given(self) -> bool:
        """Whether others start the servers."""
        return bool(self.urls or self.urls_file or self.urls_dir)

    def gpus(self, local_ranks: int) -> range:
        """The GPUs of the started servers, `tensor` each in turn, on a machine with so many ranks of the trainer."""
        first = local_ranks if self.first_gpu is None else self.first_gpu
        return range(first, first + self.servers * self.tensor)
