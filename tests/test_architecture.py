"""Who may import whom: docs/architecture.md's rules, read off the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gtpo_megatron"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "control", "errors", "network", "processes", "rollcall", "vigil"}
READERS = {
    "cluster.record",
    "run.alarm",
    "run.directory",
    "run.metrics",
    "trajectories",
}  # what a run leaves behind, for those who read it
# room -> the other rooms of ours that it may import; a file of the package that stands in no room fails
ALLOWED = {
    "algorithm": set(),
    "policy.head": set(),
    "errors": set(),
    "config": {"errors"},
    "control": {"errors"},
    "registry": set(),
    "network": {"errors"},
    "processes": set(),
    "rollcall": {"control"},
    "vigil": {"errors"},
    "machine": BASE,
    "cluster": BASE | {"cluster.record", "registry", "run.directory"},
    "cluster.record": set(),
    "plan": BASE | {"data", "machine", "rewards"},  # rewards: whether their options fit
    "trajectories": BASE | {"algorithm"},
    "data": BASE,
    "rewards": BASE,
    "rollout": BASE | {"algorithm", "trajectories", "data", "rewards"},
    "rollout.sglang.client": BASE | {"rollout", "trajectories"},
    "rollout.sglang.weights": BASE | {"rollout", "rollout.sglang.client"},
    "rollout.sglang.servers": BASE | {"registry", "rollout.sglang.client", "rollout.sglang.weights"},
    "rollout.sglang.audit": BASE
    | {"rollout.sglang.client", "rollout.sglang.servers", "rollout.sglang.weights"},
    "rollout.sglang": BASE
    | {
        "rollout",
        "rollout.sglang.audit",
        "rollout.sglang.client",
        "rollout.sglang.servers",
        "rollout.sglang.weights",
        "trajectories",
    },
    "policy": BASE | {"algorithm", "machine", "trajectories", "plan", "policy.head"},
    "evaluation": BASE | {"data", "plan", "policy", "rewards", "rollout", "rollout.sglang", "trajectories"},
    "run.alarm": BASE,
    "run.metrics": BASE,
    "run.progress": BASE,
    "run.directory": BASE,
    "run.facts": BASE | {"plan"},
    "run": BASE
    | {
        "data",
        "plan",
        "policy",
        "rewards",
        "rollout",
        "rollout.sglang",
        "rollout.sglang.audit",
        "rollout.sglang.weights",
        "run.alarm",
        "run.facts",
        "run.metrics",
        "run.progress",
        "run.directory",
        "trajectories",
    },
    "run.serve": BASE | {"registry", "rollout.sglang.client", "rollout.sglang.servers", "run.directory"},
    "analysis": BASE | READERS | {"algorithm"},
    "train": BASE | {"analysis", "data", "evaluation", "policy", "run", "trajectories"},
    "replay.float64": {"errors", "trajectories"},
    "replay": BASE | {"policy", "replay.float64", "run", "run.metrics", "train", "trajectories"},
    "scaling": BASE | {"plan", "run.facts", "run.metrics"},
    "sweep": BASE | {"run.directory", "run.metrics"},
    "commands": BASE
    | {
        "analysis",
        "cluster",
        "cluster.record",
        "data",
        "evaluation",
        "machine",
        "plan",
        "policy",
        "replay",
        "run",
        "run.directory",
        "run.serve",
        "scaling",
        "sweep",
        "train",
    },
    "__main__": {"commands"},
    "__init__": set(),
}
# What these look at is the machine, or the tensor in their hands; nothing in them decides how the policy is computed.
MAY_SAY_CUDA = {
    "policy/platform.py": "the one place that knows",
    "policy/without_cuda.py": "what it leads to the CPU",
    "machine/doctor.py": "reports what the machine has",
    "machine/screen.py": "tries the GPUs of a node before ranks start on it",
    "machine/probe.py": "looks at the machine for the rules and the doctor",
    "rollout/sglang/engine.py": "default device of servers that it starts",
    "rollout/sglang/weights/buckets.py": "waits for the stream of a tensor that another thread sends",
    "rollout/sglang/weights/broadcast.py": "NCCL broadcasts on the device of the tensor that it is given",
}


def room_of(parts: list[str]) -> str:
    """policy/step.py -> policy; rollout/sglang/servers/pool.py -> rollout.sglang.servers; train.py -> train."""
    inner = (".".join(parts[:depth]) for depth in (3, 2))
    return next((room for room in inner if room in ALLOWED), parts[0])


def room(source: Path) -> str:
    return room_of(list(source.relative_to(PACKAGE).with_suffix("").parts))


def imports(source: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a.b import c` gives a.b.c."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_rooms(source: Path) -> set[str]:
    """Rooms of ours that a file imports, its own left out."""
    names = (name.split(".")[1:] for name in imports(source) if name.startswith("gtpo_megatron."))
    return {room_of(parts) for parts in names if parts != ["__version__"]} - {room(source)}


def importers(library: str) -> set[str]:
    return {
        source.relative_to(PACKAGE).as_posix()
        for source in SOURCES
        if any(name == library or name.startswith(f"{library}.") for name in imports(source))
    }


def test_every_file_stands_in_a_room() -> None:
    assert {
        source.relative_to(PACKAGE).as_posix() for source in SOURCES if room(source) not in ALLOWED
    } == set()


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_point_one_way(name: str) -> None:
    files = [source for source in SOURCES if room(source) == name]
    assert files
    found = {source.name: own_rooms(source) - ALLOWED[name] for source in files}
    assert {file: rooms for file, rooms in found.items() if rooms} == {}


def test_only_policy_imports_megatron() -> None:
    assert {path for path in importers("megatron") if not path.startswith("policy/")} == set()


def test_algorithm_and_head_need_torch_alone() -> None:
    allowed = {"torch", "gtpo_megatron", "triton"}
    for source in SOURCES:
        if room(source) in ("algorithm", "policy.head"):
            libraries = {name.partition(".")[0] for name in imports(source)}
            outside = {name for name in libraries - allowed if not _standard(name)}
            assert outside == set(), source
    assert importers("triton") == {"policy/head/triton_head.py"}


def test_only_rollout_sglang_speaks_http() -> None:
    assert importers("aiohttp") == {"rollout/sglang/client.py"}
    others = {
        path for path in importers("gtpo_megatron.rollout.sglang") if not path.startswith("rollout/sglang/")
    }
    assert others == {"run/run.py", "run/serve.py", "run/weights.py", "evaluation/engines.py"}


def test_train_is_the_algorithm_alone() -> None:
    libraries = {name.partition(".")[0] for name in imports(PACKAGE / "train.py")}
    assert libraries.isdisjoint({"megatron", "torch", "transformers", "aiohttp"})


def test_one_module_kills_process_groups_and_watches_owners() -> None:
    found = {
        source.relative_to(PACKAGE).as_posix()
        for source in SOURCES
        if any(word in source.read_text(encoding="utf-8") for word in ("killpg", "getppid(", "PDEATHSIG"))
    }
    assert found == {"processes.py"}


def test_the_cluster_is_seen_without_torch() -> None:
    """Login nodes have none, and a command there answers at once."""
    for source in SOURCES:
        if source.is_relative_to(PACKAGE / "cluster"):
            assert {name.partition(".")[0] for name in imports(source)}.isdisjoint(
                {"torch", "transformers"}
            ), source


def test_one_module_knows_cuda() -> None:
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                found.add(source.relative_to(PACKAGE).as_posix())
    assert found == set(MAY_SAY_CUDA)


def _standard(name: str) -> bool:
    import sys

    return name in sys.stdlib_module_names
