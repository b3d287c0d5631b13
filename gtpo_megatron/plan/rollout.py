"""Rules on sampling: settings that the chosen engine cannot follow, and servers for which there is no place."""

from collections.abc import Iterator

from gtpo_megatron.config import RolloutConfig, RunConfig
from gtpo_megatron.machine.probe import Machine


def engine_problems(rollout: RolloutConfig) -> Iterator[str]:
    """Settings of sampling that contradict each other, or that have no effect with its engine."""
    yield from (_embedded_problems if rollout.engine == "embedded" else _sglang_problems)(rollout)


def _embedded_problems(rollout: RolloutConfig) -> Iterator[str]:
    server = rollout.sglang
    for key, value in server.changed():
        yield f"rollout.sglang.{key}: {value!r} has no effect with rollout.engine: embedded; set rollout.engine: sglang or drop it"
    if rollout.oversample > 1:
        yield (
            f"rollout.oversample: {rollout.oversample} needs rollout.engine: sglang; "
            "the embedded engine finishes its groups together, so there is no long tail to cut"
        )
    if rollout.staleness > 1:
        yield (
            f"rollout.staleness: {rollout.staleness} needs rollout.engine: sglang; the embedded engine samples one "
            "batch ahead at most, so that a seed fixes the weights of every batch"
        )


def _sglang_problems(rollout: RolloutConfig) -> Iterator[str]:
    server = rollout.sglang
    if rollout.batch_size != type(rollout).model_fields["batch_size"].default:
        yield (
            f"rollout.batch_size: {rollout.batch_size} belongs to rollout.engine: embedded; "
            "with sglang set rollout.sglang.concurrency"
        )
    given = [f"rollout.sglang.{key}" for key in ("urls", "urls_file", "urls_dir") if getattr(server, key)]
    if len(given) > 1:
        yield f"{' and '.join(given)}: give one of the two"
    for key in ("servers", "tensor", "first_gpu", "memory_share"):
        value = getattr(server, key)
        if (server.urls or server.urls_file) and value != type(server).model_fields[key].default:
            yield f"rollout.sglang.{key}: {value}: servers are given by URL, so none is started; drop one of the two"
    fixed = len(server.urls) or (0 if server.given else server.servers)
    if fixed and server.needed(fixed) > fixed:
        yield f"rollout.sglang.quorum: {server.quorum}: there are {fixed} servers; ask for {fixed} or fewer"
    if server.host not in ("127.0.0.1", "localhost", "::1") and server.api_key is None:
        yield (
            f"rollout.sglang.host: {server.host} is reachable from other machines: "
            "set rollout.sglang.api_key (e.g. env:SGLANG_API_KEY)"
        )
    if server.partial and not (rollout.staleness or server.group_timeout_s or rollout.oversample > 1):
        yield (
            "rollout.sglang.partial: true continues unfinished completions, but here none is ever left unfinished: "
            "it needs rollout.staleness, rollout.sglang.group_timeout_s or rollout.oversample"
        )


def server_problems(config: RunConfig, machine: Machine) -> Iterator[str]:
    """SGLang servers to be started here for which there are no GPUs."""
    server = config.rollout.sglang
    if config.rollout.engine != "sglang" or server.given or not machine.gpus:
        return
    gpus = config.rollout.servers.gpus(machine.local_ranks)
    if gpus.stop > machine.gpus:
        yield (
            f"rollout.sglang: {server.servers} servers of tensor {server.tensor} would take the GPUs {gpus.start} to "
            f"{gpus.stop - 1}, but this process sees {machine.gpus}: start fewer ranks or servers here, give servers by "
            "URL, or let them take turns with the ranks on the same GPUs (rollout.placement: together)"
        )
