"""Rules on servers that share the ranks' GPUs (`rollout.placement: together`), and what of a GPU's memory is whose, by turn."""

import os
from collections.abc import Iterator

from gtpo_megatron.config import RunConfig
from gtpo_megatron.machine.probe import Machine
from gtpo_megatron.plan.facts import GPU, Efficiency, of_shape
from gtpo_megatron.plan.layout import HFShape
from gtpo_megatron.plan.memory import RankMemory, training_memory
from gtpo_megatron.plan.sampling import Server

TOGETHER = "rollout.placement: together"


def placement_problems(config: RunConfig) -> Iterator[str]:
    """Settings that servers in turn with the trainer do not go with."""
    rollout = config.rollout
    server = rollout.sglang
    if rollout.placement == "apart":
        return
    if config.algorithm.name == "sft":
        yield f"{TOGETHER} has no meaning with algorithm.name: sft, which samples nothing; drop it"
    elif rollout.engine != "sglang":
        yield f"{TOGETHER} needs rollout.engine: sglang; the embedded engine is in the ranks in any case"
    for key in ("urls", "urls_file", "urls_dir"):
        if getattr(server, key):
            yield (
                f"{TOGETHER} starts its servers itself, beside the ranks, and rollout.sglang.{key} gives servers that others "
                "start: drop one of the two"
            )
    if server.router:
        yield (
            f"{TOGETHER} does not go with rollout.sglang.router: true: the router asks servers for their health while they have "
            "no memory, which ends them; set it to false"
        )
    if rollout.staleness:
        yield (
            f"{TOGETHER} does not go with rollout.staleness: {rollout.staleness}: a batch cannot be sampled ahead while the "
            "trainer has the memory; set staleness: 0, or placement: apart"
        )
    if server.weight_transfer == "distributed":
        yield (
            f"{TOGETHER} does not go with rollout.sglang.weight_transfer: distributed: a process group has no two members on one "
            "GPU; set tensor (CUDA IPC), or disk"
        )


def placement_machine_problems(config: RunConfig, world_size: int, machine: Machine) -> Iterator[str]:
    """Ranks on other machines than the servers, and servers on GPUs without a rank."""
    if config.rollout.placement == "apart":
        return
    here = machine.local_ranks
    if here < world_size and (here > 1 or "WORLD_SIZE" in os.environ):
        yield (
            f"{TOGETHER} with {world_size} ranks, of which {here} are on this machine: rank 0 starts servers on its own machine "
            "alone. Take as many ranks as one machine has GPUs, or placement: apart"
        )
    yield from _server_problems(config, world_size if machine.gpus else None)


def _server_problems(config: RunConfig, ranks: int | None) -> Iterator[str]:
    gpus = config.rollout.servers.gpus(ranks or 0)
    if ranks is not None and gpus.stop > ranks:
        server = config.rollout.sglang
        yield (
            f"{TOGETHER}: {server.servers} servers of tensor {server.tensor} from GPU {gpus.start} on take the GPUs to "
            f"{gpus.stop - 1}, but ranks are on 0 to {ranks - 1}: lower rollout.sglang.servers or tensor"
        )


def together_problems(config: RunConfig, gpus: int) -> list[str]:
    """As the planner asks: whether the servers have room beside `gpus` ranks."""
    return list(_server_problems(config, gpus)) if config.rollout.placement == "together" else []


def placed_server(config: RunConfig, shape: HFShape, gpus: int, gpu: GPU, tensor: int) -> Server:
    """One of the servers of a recipe; together it has of its GPUs what the trainer's ranks there leave it."""
    share = config.rollout.sglang.memory_share or Server.memory_share
    if config.rollout.placement == "together":
        kept = max(stage.while_sampling for stage in training_memory(config, shape, gpus, 1))
        share *= max(0.0, 1 - kept / gpu.memory)
    return Server(of_shape(shape, ""), gpu, tensor, memory_share=share)


def turn_seconds(config: RunConfig, memory: tuple[RankMemory, ...], gpu: GPU, reached: Efficiency) -> float:
    """Of a step: the optimizer's state to the host and back, through a GPU's share of its memory. Servers' calls are not counted."""
    if config.rollout.placement == "apart":
        return 0.0
    moved = 2 * max(stage.optimizer for stage in memory)
    return moved / (gpu.host_bandwidth * reached.host_memory)


def turn_peaks(memory: tuple[RankMemory, ...], server: Server) -> dict[str, float]:
    """Bytes on a GPU in each turn, of the stage that holds most of it."""
    kept = max(stage.while_sampling for stage in memory)
    return {
        "training": max(stage.total for stage in memory),
        "weights": kept + server.weights,
        "sampling": kept + server.weights + max(0.0, server.cache),
    }
