"""The facts of one cluster, in a file of its own: the same recipe runs under all of them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gtpo_megatron.config.loading import load_file
from gtpo_megatron.config.section import Section
from gtpo_megatron.errors import UserError

SITES = Path(__file__).parents[2] / "slurm" / "sites"
SUFFIX = ".yaml"


class ContainerConfig(Section):
    """The container that ranks run in."""

    kind: Literal["none", "pyxis", "apptainer"] = Field(
        "none", description="pyxis: srun's --container-* options"
    )
    image: str | None = Field(
        None, description="a file, or what pyxis pulls: nvcr.io#nvidia/pytorch:25.10-py3"
    )
    mounts: tuple[str, ...] = Field((), description="folders that exist inside: /path, or /outside:/inside")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.kind == "none" and (self.image or self.mounts):
            raise ValueError("container.image and container.mounts have no effect with container.kind: none")
        if self.kind != "none" and not self.image:
            raise ValueError(f"container.kind: {self.kind} needs container.image")
        return self

    @field_validator("mounts")
    @classmethod
    def _absolute(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [mount for mount in mounts if not mount.startswith("/")]:
            raise ValueError(f"a mount is an absolute path, not {wrong[0]}")
        return mounts

    def holds(self, path: Path) -> bool:
        """Whether a path outside is there, under the same name, inside."""
        same = [m for m in self.mounts if ":" not in m or m.split(":")[0] == m.split(":")[1]]
        return self.kind == "none" or any(path.is_relative_to(mount.split(":")[0]) for mount in same)


class Site(Section):
    """What a cluster needs of a job, and has for it."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = Field("24:00:00", description="time limit of a job, as sbatch takes it")
    gpus_per_node: int = Field(8, ge=0, description="0: nodes without GPUs")
    ranks_per_node: int | None = Field(None, ge=1, description="default: one a GPU")
    cpus_per_rank: int | None = Field(None, ge=1)
    compute_capability: float = Field(9.0, description="of the GPUs: what the recipe is checked against")
    stop_before_s: int = Field(
        300, ge=60, description="seconds before the time limit at which a run is asked to save and stop"
    )
    screening_s: int = Field(
        30,
        ge=0,
        description="seconds in which each node has to show that it is fit before ranks start; 0: never",
    )
    hung_after_s: int = Field(
        90, ge=0, description="seconds without a sign of life after which a rank counts as hung; 0: never"
    )
    sbatch: tuple[str, ...] = Field((), description="more options, e.g. --exclusive")
    sbatch_servers: tuple[str, ...] = Field(
        (), description="more options of jobs of servers, e.g. --partition=preempt"
    )
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    container: ContainerConfig = ContainerConfig()
    python: str | None = Field(
        None, description="the interpreter on a node; default: the one that submits, in a container python3"
    )
    interface: str | None = Field(None, description="network interface of NCCL and gloo, e.g. ib0")
    env: dict[str, str] = Field({}, description="more variables of the ranks")

    @field_validator("sbatch", "sbatch_servers")
    @classmethod
    def _options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [option for option in options if not option.startswith("-") or "\n" in option]:
            raise ValueError(f"an option of sbatch starts with -, unlike {wrong[0]!r}")
        return options

    @field_validator("env", mode="before")
    @classmethod
    def _as_text(cls, env: object) -> object:
        """NCCL_IB_TIMEOUT: 22 is meant as text."""
        if not isinstance(env, dict):
            return env
        return {name: str(value) if isinstance(value, int | float) else value for name, value in env.items()}

    @model_validator(mode="after")
    def _has_ranks(self) -> Self:
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ValueError("gpus_per_node: 0 needs ranks_per_node: how many ranks a node runs")
        return self


def load_site(name: str) -> Site:
    """The site of slurm/sites/<name>.yaml, or of a file, by its path.

    Raises:
        UserError: there is no such file, or it has a mistake, named with its line.
    """
    path = Path(name) if name.endswith(SUFFIX) or "/" in name else SITES / f"{name}{SUFFIX}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SITES.glob(f"*{SUFFIX}")))
        raise UserError(f"--site {name}: no file {path}; give a path, or one of {SITES}: {known}")
    return load_file(path, Site)
