"""What a checkpoint holds of the trainer: sharded tensors of policy and optimizer, and the random state of every rank.

Only tensors go through megatron.core.dist_checkpointing. What its optimizers would add as pickled objects (hyper-
parameters, a step count) is the configuration's and one integer, so a checkpoint stays readable in any layout.
"""

import contextlib
import inspect
import pickle
import queue
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gtpo_megatron import control
from gtpo_megatron.errors import UserError
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.adapters import is_adapter
from gtpo_megatron.policy.checkpoint.safety import read_metadata, safe_loading
from gtpo_megatron.policy.model import Policy, unwrap
from gtpo_megatron.policy.optimizer import Optimizer

_OPTIMIZER = "optimizer.state."
_MAIN_PARAMETERS = f"{_OPTIMIZER}fp32_param."


def policy_tensors(policy: Policy) -> dict[str, Any]:
    """Sharded tensors of the model chunks on this rank, data included (the parameters themselves).

    Of a policy with adapters, theirs alone: the base is what it was.
    """
    state = {
        f"model{i}": {
            name: value
            for name, value in unwrap(chunk).sharded_state_dict(metadata=_metadata()).items()
            if policy.peft is None or is_adapter(name)
        }
        for i, chunk in enumerate(policy.chunks)
    }
    return extract_sharded_tensors_and_factories(state)[0]


def training_state(
    policy: Policy, optimizer: Optimizer, *, loading: bool = False
) -> tuple[dict[str, Any], Any]:
    """Sharded tensors of policy and optimizer, and the optimizer's state without them (never stored)."""
    materialize(optimizer)
    tensors = policy_tensors(policy)
    state = optimizer.megatron.sharded_state_dict(tensors, is_loading=loading, metadata=_metadata())
    sharded, rest = extract_sharded_tensors_and_factories({"optimizer": state})
    # the distributed optimizer names the main parameters differently
    sharded = _rename(sharded, f"{_OPTIMIZER}param.", _MAIN_PARAMETERS)
    return tensors | sharded, _map(
        rest["optimizer"], lambda v: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v
    )


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # gathers on one rank of each replica group, in host memory; else every rank would hold all of it
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def stored_bytes(tensors: dict[str, Any]) -> int:
    """Bytes that all ranks together will store. Collective."""
    own = sum(t.data.nbytes for t in nested_values(tensors) if is_main_replica(t.replica_id))
    total = torch.tensor(own, dtype=torch.int64, device=platform.device())
    dist.all_reduce(total)
    return int(total)


def nonfinite_tensors(tensors: dict[str, Any]) -> list[str]:
    """Names of the floating-point tensors, of those that this rank stores, with a NaN or an infinity. Sorted."""
    stored = [
        t for t in nested_values(tensors) if is_main_replica(t.replica_id) and t.data.is_floating_point()
    ]
    if not stored:
        return []
    bad: set[str] = set()
    for device in {t.data.device for t in stored}:  # the distributed optimizer's are gathered on the host
        there = [t for t in stored if t.data.device == device]
        finite = torch.stack([t.data.isfinite().all() for t in there]).tolist()  # one wait for the device
        bad.update(t.key for t, good in zip(there, finite, strict=True) if not good)
    return sorted(bad)


def begin_save(tensors: dict[str, Any], directory: Path, *, asynchronous: bool) -> Any:
    """Plan the writing of sharded tensors into an existing empty directory. Collective.

    The returned request is either executed (`execute_sync`) or given to Megatron's queue of asynchronous calls.
    """
    upstream = inspect.signature(dist_checkpointing.save).parameters
    filesystem_async._results_queue = _FileQueue() if asynchronous else queue.Queue()
    with _writing_in_one_process():
        return dist_checkpointing.save(
            tensors,
            str(directory),
            sharded_strategy=TorchDistSaveShardedStrategy(backend="torch_dist", version=1, thread_count=1),
            async_sharded_save=True,
            **({"async_strategy": "mcore"} if "async_strategy" in upstream else {}),
        )


class _FileQueue:
    """Carries write results from a forked writer to its trainer through a nameless file.

    Upstream's queue lives in a manager process of its own, which would outlive a killed trainer.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the queue)

    def put(self, item: Any) -> None:
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # written by our own child, and nobody else can reach the file
        except EOFError:
            raise queue.Empty from None


@contextlib.contextmanager
def _writing_in_one_process() -> Iterator[None]:
    """megatron-core 0.16 forks a process per file; those of a killed trainer would go on writing."""
    writer = filesystem_async.FileSystemWriterAsync
    if not hasattr(writer, "write_preloaded_data_multiproc"):  # later versions use threads
        yield
        return
    original = writer.__dict__["write_preloaded_data_multiproc"]
    writer.write_preloaded_data_multiproc = staticmethod(_write_buckets)
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = original


def _write_buckets(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        outcomes: queue.Queue = queue.Queue()
        running: queue.Queue = queue.Queue()
        running.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms,
            local_proc_idx=index,
            write_bucket=bucket,
            results_queue=outcomes,
            count_queue=running,
            use_fsync=True,
        )
        outcome = outcomes.get()[1]
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[index] = outcome
    results.put(written)


def load_policy(policy: Policy, directory: Path) -> None:
    """Load parameters alone, in this run's layout. Collective. Raises UserError where the model is another one."""
    tensors = policy_tensors(policy)
    _check_names(tensors, directory)
    _assign_policy(policy, _load(tensors, directory))


def load_training_state(policy: Policy, optimizer: Optimizer, adam_step: int, directory: Path) -> None:
    """Load policy and optimizer, in this run's layout. Collective. Raises UserError where the model is another one."""
    tensors, rest = training_state(policy, optimizer, loading=True)
    _check_names(tensors, directory)
    stored = read_metadata(directory).state_dict_metadata
    if not any(name.startswith(_MAIN_PARAMETERS) for name in stored):
        # saved in fp32 without the distributed optimizer: the parameters are their own main parameters
        main, tensors = extract_matching_values(tensors, lambda t: t.key.startswith(_MAIN_PARAMETERS))
        loaded = merge(_load(tensors, directory), _load(_rename(main, _MAIN_PARAMETERS, ""), directory))
    else:
        loaded = _load(tensors, directory)
    _assign_policy(policy, loaded)
    state = merge(rest, loaded["optimizer"])
    if any(_keeps_step_per_parameter(adam) for adam in _adams(optimizer)):
        _give_step(state, adam_step)
    optimizer.megatron.load_state_dict(state)
    _set_adam_step(optimizer, adam_step)
    for hybrid in _hybrids(optimizer):
        _keep_own_part(hybrid)
    if policy.config.fp8 and policy.config.fp8_param:
        _round_weights_again(policy, optimizer)


def _load(tensors: dict[str, Any], directory: Path) -> dict[str, Any]:
    with safe_loading():
        try:
            return dist_checkpointing.load(tensors, str(directory))
        except UserError:
            raise
        # upstream raises KeyError, ValueError and classes of its own, one of them a BaseException
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"{directory}: the checkpoint does not fit this run's model: {short_reason(error)}"
            ) from error


def short_reason(error: BaseException) -> str:
    """The start of the error's text; of a failure on several ranks, that of the first, without tracebacks."""
    if isinstance(error, CheckpointException):
        error = next((failure for failure, _ in error.failures.values()), OSError("another rank failed"))
    if isinstance(error, pickle.UnpicklingError):
        return "a file in it is not plain tensors, and what it asks to execute was refused"
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _check_names(tensors: dict[str, Any], directory: Path) -> None:
    """Every parameter of the whole model must be in the checkpoint, and nothing more. Collective."""
    own = {t.key for t in nested_values(tensors) if not t.key.startswith(_OPTIMIZER)}
    wanted = control.broadcast_from_zero(set().union(*(control.gather_to_zero(own) or [])))
    stored = {
        name for name in read_metadata(directory).state_dict_metadata if not name.startswith(_OPTIMIZER)
    }
    stored = {name for name in stored if not name.startswith("common_state")}
    missing, extra = sorted(wanted - stored), sorted(stored - wanted)
    if missing or extra:
        raise UserError(
            f"{directory}: the checkpoint is of another model: {len(missing)} of this model's tensors are missing "
            f"({', '.join(missing[:3])}) and {len(extra)} are unknown ({', '.join(extra[:3])})"
        )


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return change(value)


def _rename(tensors: dict[str, Any], prefix: str, new: str) -> dict[str, Any]:
    return _map(
        tensors, lambda t: replace(t, key=new + t.key.removeprefix(prefix)) if t.key.startswith(prefix) else t
    )


def _assign_policy(policy: Policy, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(policy.chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in missing if "_extra_state" not in name]  # Transformer Engine's FP8 history
        if policy.peft is not None:
            missing = [name for name in missing if is_adapter(name)]  # the base is not in the checkpoint
        if missing or unexpected:
            raise UserError(f"checkpoint: parameters not loaded: {missing}; without a place: {unexpected}")


def _inner(optimizer: Optimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron])
    return [part.optimizer for part in chained if part.optimizer is not None]


def _hybrids(optimizer: Optimizer) -> list[HybridDeviceOptimizer]:
    """Those of an offloaded optimizer; each has a torch AdamW on the host for every parameter."""
    return [inner for inner in _inner(optimizer) if isinstance(inner, HybridDeviceOptimizer)]


def _round_weights_again(policy: Policy, optimizer: Optimizer) -> None:
    """Weights kept in FP8, from their main parameters as after an update. A file has them in bf16, which says neither their
    scales nor their values exactly.
    """
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        part._copy_main_params_to_model_params()
    if any(chunk.ddp_config.use_distributed_optimizer for chunk in policy.chunks):
        for chunk in policy.chunks:
            chunk.start_param_sync(force_sync=True)


def _adams(optimizer: Optimizer) -> list[torch.optim.Optimizer]:
    return [
        adam
        for inner in _inner(optimizer)
        for adam in (inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner])
    ]


def _keep_own_part(hybrid: HybridDeviceOptimizer) -> None:
    """A loaded state is a view of the whole tensor, which would stay in host memory with it."""
    for adam in hybrid.sub_optimizers:
        for state in adam.state.values():
            for name, value in state.items():
                if value.untyped_storage().nbytes() > value.nbytes:
                    state[name] = value.clone()
    hybrid._sync_sub_optimizers_state_to_hdo()


def _keeps_step_per_parameter(adam: torch.optim.Optimizer) -> bool:
    return isinstance(
        adam, torch.optim.Adam
    )  # AdamW included; apex and Transformer Engine keep it in the group


def materialize(optimizer: Optimizer) -> None:
    """Give every parameter its Adam state, as the first step would, so that it can be saved and loaded before."""
    for adam in _adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            state = adam.state[parameter]
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(parameter.data),
                torch.zeros_like(parameter.data),
            )
            if _keeps_step_per_parameter(adam):
                state["step"] = torch.tensor(0.0)
    for hybrid in _hybrids(optimizer):
        hybrid._sync_sub_optimizers_state_to_hdo()


def adam_step(optimizer: Optimizer) -> int:
    """Number of updates that Adam has done."""
    for adam in _adams(optimizer):
        steps = (
            [int(state["step"]) for state in adam.state.values()]
            if _keeps_step_per_parameter(adam)
            else [int(group["step"]) for group in adam.param_groups if "step" in group]
        )
        if steps:
            return max(steps)
    return 0


def _set_adam_step(optimizer: Optimizer, step: int) -> None:
    for adam in _adams(optimizer):
        if _keeps_step_per_parameter(adam):
            for state in adam.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in adam.param_groups:
                group["step"] = step


def _give_step(state: Any, step: int) -> None:
    """Add Adam's step to every parameter's state; torch's Adam refuses a state without one, Transformer Engine's one with."""
    if isinstance(state, dict):
        if "exp_avg" in state:
            state.setdefault("step", torch.tensor(float(step)))
        for value in state.values():
            _give_step(value, step)


def random_state() -> dict[str, Tensor]:
    """Every random generator of this rank: Python, NumPy, torch, the device, Megatron's tracker."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": platform.random_state(),
    }
    for key, value in get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{key}"] = value.cpu()
    return {key: value.clone() for key, value in state.items()}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned."""
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), *(state["python_gauss"].tolist() or [None])))
    position, has_gauss = state["numpy_position"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    platform.set_random_state(state["device"])
    trackers = {k.removeprefix("tracker."): v for k, v in state.items() if k.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(trackers)
