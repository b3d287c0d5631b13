"""Each mend of an upstream fault is needed on the versions that it names, and on no others: upstream's own code is run."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from gtpo_megatron.policy import platform
from gtpo_megatron.policy.mends.table import MENDS, markdown
from tests.parallel.pool import RankPool

platform.install()

import megatron.core.extensions.transformer_engine as transformer_engine  # noqa: E402
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer  # noqa: E402
import megatron.core.transformer.moe.moe_utils as moe_utils  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

import gtpo_megatron.policy.model  # noqa: E402, F401  mends what is to be mended
from gtpo_megatron.policy.mends import bridge, core  # noqa: E402

Patch = pytest.MonkeyPatch


def fresh(name: str) -> ModuleType:
    """The module as upstream wrote it, executed anew beside the one that is mended."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fails_without(name: str, missing: tuple[str, ...], patch: Patch) -> bool:
    """Whether the module cannot be imported where `missing` are not installed."""
    for library in missing:
        patch.setitem(sys.modules, library, None)
    try:
        fresh(name)
    except ImportError as error:
        return any(library in str(error) for library in missing)
    return False


def bridge_import(patch: Patch) -> bool:
    missing = ("transformer_engine", "transformer_engine.pytorch")
    return fails_without("megatron.bridge.peft.lora_layers", missing, patch)


def peft_stand_ins(patch: Patch) -> bool:
    return fresh("megatron.bridge.peft.utils").HAVE_TE


def peft_recompute(patch: Patch) -> bool:
    """Whether a later model of the same number is taken for one that was seen."""
    recompute = fresh("megatron.bridge.peft.recompute")
    seen = inspect.getsource(recompute.maybe_enable_recompute_inputs_grad)
    return isinstance(recompute.PEFT_RECOMPUTE_PATCHED, set) and "add(id(" in seen


def paged_stash(patch: Patch) -> bool:
    try:
        present = importlib.util.find_spec(core.PAGED_STASH) is not None
    except ModuleNotFoundError:  # of the package that holds it, in older versions
        return False
    return present and fails_without(core.PAGED_STASH, ("triton", "triton.language"), patch)


def router_gemm(patch: Patch) -> bool:
    function = fresh(moe_utils.__name__).RouterGatingLinearFunction
    tokens, experts = torch.ones(2, 4), torch.ones(3, 4)
    try:
        function.forward(
            SimpleNamespace(save_for_backward=lambda *_: None), tokens, experts, None, torch.float32
        )
    except NameError as error:
        return "te_general_gemm" in str(error)
    return False


def host_counts(patch: Patch) -> bool:
    counts = fresh(moe_utils.__name__).maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    return torch.is_tensor(counts)


def host_offload(patch: Patch) -> bool:
    mended = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"

    def update(module: ModuleType) -> list[float]:
        parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        adam = torch.optim.AdamW
        optimizer = module.HybridDeviceOptimizer(
            [parameter], 1.0, adam, adam, param_update_in_fp32=True, lr=0.5, weight_decay=0.0
        )
        parameter.grad = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
        optimizer.step()
        return parameter.tolist()

    assert update(importlib.import_module(mended)) == [0.5, 1.5]
    try:
        return update(fresh(mended)) != [0.5, 1.5]
    except KeyError:  # of the copy of a parameter
        return True


def expert_shards(patch: Patch) -> bool:
    """tests/te/test_layers.py shows what follows from it: without Transformer Engine there is nothing to run."""
    return "tensor_model_parallel = " not in inspect.getsource(transformer_engine)


def gathered_norm(patch: Patch) -> bool:
    """tests/policy/test_lora.py with Transformer Engine's layers shows what follows from it."""
    attributes = fresh("megatron.bridge.peft.utils").get_adapter_attributes_from_linear
    return "return_layernorm_output_gathered = " in inspect.getsource(attributes)


def fp8_main_weights(patch: Patch) -> bool:
    """As above; tests/te/test_fp8.py."""
    from megatron.bridge.models.conversion import model_bridge

    takes_first = "get_high_precision_init_val()" in inspect.getsource(distrib_optimizer)
    return takes_first and "high_precision" not in inspect.getsource(model_bridge)


def fp8_first_scale(patch: Patch) -> bool:
    """As above; tests/te/test_fp8.py."""
    made = torch.full((2,), 7.0)
    without = SimpleNamespace(perform_initialization=False)
    transformer_engine.condition_init_method(without, nn.init.zeros_)(made)
    return bool((made == 7).all())


def expert_state(patch: Patch) -> bool:
    """As above; tests/te/test_resume.py."""
    return "if state is None:\n                return [torch.empty" not in inspect.getsource(
        transformer_engine
    )


def adam_step(patch: Patch) -> bool:
    own, model = torch.zeros(2), nn.Parameter(torch.zeros(2))
    state = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": torch.tensor(3.0)}
    optimizer = SimpleNamespace(
        model_param_group_index_map={model: (0, 0)},
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        optimizer=SimpleNamespace(param_groups=[{"params": [own]}], state={own: state}),
    )
    loaded = {"param": torch.ones(2), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    mended = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states
    mended(optimizer, model, dict(loaded))
    assert own.tolist() == state["exp_avg"].tolist() == [1, 1] and state["step"] == 3
    try:
        core.UPSTREAM["adam-step"](optimizer, model, dict(loaded))
    except KeyError as error:
        return error.args == ("step",)
    return False


def contiguous_scatter(patch: Patch) -> bool:
    sent: list[torch.Tensor] = []
    patch.setattr(torch.distributed, "get_global_rank", lambda *_, **__: 0)
    patch.setattr(torch.distributed, "scatter", lambda output, parts, **_: sent.extend(parts))
    mapping = SimpleNamespace(tp_size=2, tp_rank=0, tp_group=None)
    halves = list(torch.arange(8.0).view(2, 4).chunk(2, dim=1))  # of o_proj: columns
    call = (halves, halves[0].shape, torch.float32, torch.device("cpu"))
    bridge.param_mapping.MegatronParamMapping.scatter_to_tp_ranks(mapping, *call)
    assert [part.is_contiguous() for part in sent] == [True, True]
    sent.clear()
    bridge.UPSTREAM["contiguous-scatter"](mapping, *call)
    return not all(part.is_contiguous() for part in sent)


def shared_embeddings(patch: Patch) -> bool:
    """The last of two stages of two chunks each: embeddings go to the output layer of its last chunk."""
    first, last = nn.Module(), nn.Module()
    last.output_layer = nn.Linear(2, 3, bias=False)
    for chunk in (first, last):
        chunk.config = SimpleNamespace(pipeline_model_parallel_size=2)
    for name, value in {"is_pp_first_stage": False, "is_pp_last_stage": True, "_get_pp_group": None}.items():
        patch.setattr(bridge.model_bridge, name, lambda *_, value=value: value, raising=False)
    patch.setattr(bridge.model_bridge, "_get_embedding_group", lambda *_: "embeddings", raising=False)
    patch.setattr(bridge.parallel_state, "is_pipeline_first_stage", lambda *_, **__: False)
    patch.setattr(bridge.parallel_state, "is_pipeline_last_stage", lambda *_, **__: True)
    patch.setattr(bridge.parallel_state, "get_embedding_group", lambda *_, **__: "embeddings")
    patch.setattr(torch.distributed, "get_process_group_ranks", lambda _: [0, 1])
    patch.setattr(torch.distributed, "get_rank", lambda: 1)
    patch.setattr(torch.distributed, "broadcast", lambda tensor, **_: tensor.fill_(7))
    own = SimpleNamespace(_share_embeddings_and_output_weights=lambda *_: True)
    bridge.model_bridge.MegatronModelBridge._broadcast_shared_embeddings(own, [first, last])
    assert last.output_layer.weight.eq(7).all()
    try:
        bridge.UPSTREAM["shared-embeddings"](own, [first, last])
    except AssertionError as error:
        return "Output layer not found" in str(error)
    return False


def vocabulary_padding(patch: Patch) -> bool:
    embedding = nn.Module()
    embedding.word_embeddings = nn.Embedding(3, 4)  # a rank's half of 5 tokens and one of padding
    model = nn.Module()
    model.embedding = embedding
    mapping = SimpleNamespace(
        tp_size=2,
        tp_rank=0,
        megatron_param="embedding.word_embeddings.weight",
        hf_param="model.embed_tokens.weight",
        _normalize_expert_param_name=lambda name: name,
        scatter_to_tp_ranks=lambda splits, *_: [tuple(part.shape) for part in splits],
    )
    columns = bridge.param_mapping.ColumnParallelMapping
    assert columns.hf_to_megatron(mapping, torch.ones(5, 4), model) == [(3, 4), (3, 4)]
    try:
        bridge.UPSTREAM["vocabulary-padding"](mapping, torch.ones(5, 4), model)
    except ValueError as error:
        return "Cannot evenly split" in str(error)
    return False


def expert_gather(patch: Patch) -> bool:
    patch.setattr(
        torch.distributed, "all_gather", lambda parts, own, **_: [part.copy_(own) for part in parts]
    )
    mapping = SimpleNamespace(
        ep_size=2,
        ep_group=None,
        megatron_param="decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
        _get_config=lambda _: SimpleNamespace(num_moe_experts=4),
        broadcast_obj_from_pp_rank=lambda value, _: value,
    )
    call = (torch.ones(2, 2), nn.Module(), "model.layers.0.mlp.experts.1.up_proj.weight")
    names = {f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (1, 3)}
    assert set(bridge.param_mapping.MegatronParamMapping.gather_from_ep_ranks(mapping, *call)) == names
    try:
        return set(bridge.UPSTREAM["expert-gather"](mapping, *call)) != names
    except ValueError:  # there is no number behind ".weight"
        return True


def expert_names(patch: Patch) -> bool:
    state = bridge.parallel_state
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    patch.setattr(
        state, "get_pipeline_model_parallel_group", lambda *_, **__: SimpleNamespace(size=lambda: 1)
    )
    patch.setattr(state, "get_expert_model_parallel_group", lambda *_, **__: group)
    patch.setattr(state, "get_expert_model_parallel_rank", group.rank)
    patch.setattr(state, "get_expert_model_parallel_world_size", group.size)
    patch.setattr(bridge.model_bridge, "get_pg_size", lambda found: found.size())
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"
    call = (nn.Module(), SimpleNamespace(num_moe_experts=4), name.format(1))
    assert bridge.model_bridge._megatron_local_name_to_global(*call) == name.format(3)
    return bridge.UPSTREAM["expert-names"](*call) != name.format(3)


def results_queue(patch: Patch) -> bool:
    """Whether upstream asks for a manager process."""

    class Asked(Exception):
        pass

    def manager() -> None:
        raise Asked

    patch.setattr(filesystem_async, "_results_queue", None)
    patch.setattr(filesystem_async.mp, "get_context", lambda _: SimpleNamespace(Manager=manager))
    get = getattr(filesystem_async, "get_write_results_queue", None)
    try:
        (get or filesystem_async._get_write_results_queue)()
    except Asked:
        return True
    return False


def writer_processes(patch: Patch) -> bool:
    source = inspect.getsource(filesystem_async.FileSystemWriterAsync)
    return "ctx.Process(" in source or "mp.Process(" in source


def storage_pickle(patch: Patch) -> bool:
    return torch.storage._load_from_bytes.__module__ != "torch.storage"


def load_errors(patch: Patch) -> bool:
    from torch.distributed.checkpoint.api import CheckpointException

    return not issubclass(CheckpointException, Exception)


FAULTS: dict[str, Callable[[Patch], bool]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        bridge_import,
        contiguous_scatter,
        expert_gather,
        expert_names,
        shared_embeddings,
        vocabulary_padding,
        peft_stand_ins,
        peft_recompute,
        gathered_norm,
        paged_stash,
        router_gemm,
        expert_shards,
        expert_state,
        fp8_main_weights,
        fp8_first_scale,
        adam_step,
        host_counts,
        host_offload,
        results_queue,
        writer_processes,
        storage_pickle,
        load_errors,
    )
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mend_is_needed_where_it_is_said_to_be(name: str, monkeypatch: Patch) -> None:
    assert FAULTS[name](monkeypatch) == MENDS[name].applies()


def faults_of_a_model(checkpoint: Path) -> dict[str, bool]:
    """What a rank finds without the mends of a model and its update."""
    from transformers import AutoConfig

    from gtpo_megatron.policy import model, optimizer
    from tests.policy.step_jobs import start

    hf_config = AutoConfig.from_pretrained(checkpoint)
    wanted, _ = model.ROPE_INIT_FUNCTIONS["llama3"](hf_config, torch.device("cpu"))
    mend, model._match_rope = model._match_rope, lambda *_: None
    try:
        run = start(checkpoint, algorithm=None)
    finally:
        model._match_rope = mend
    gpt = model.unwrap(run.policy.chunks[0])
    found = {"llama3-rope": not torch.equal(gpt.rotary_pos_emb.inv_freq, wanted)}
    model._match_rope(gpt, hf_config)
    assert torch.equal(gpt.rotary_pos_emb.inv_freq, wanted)

    megatron = run.optimizer.megatron
    for parameter in gpt.parameters():
        parameter.main_grad.fill_(1e-3)
    megatron.step()
    aliases = [p.grad is not None and p.grad.data_ptr() == p.main_grad.data_ptr() for p in gpt.parameters()]
    found["gradient-alias"] = any(aliases)
    optimizer.apply_update(run.optimizer, run.policy, loss=0.0)
    assert all(p.grad is None for p in gpt.parameters())
    return found


@pytest.mark.local_layers("what is mended is in those")
def test_mends_of_a_model_are_needed(ranks: RankPool, tiny_checkpoint: Callable[[str], Path]) -> None:
    (found,) = ranks.run(1, faults_of_a_model, tiny_checkpoint("llama3"))
    assert found == {name: MENDS[name].applies() for name in found}
    assert {*FAULTS, *found} == set(MENDS)


def test_a_gpu_without_transformer_engine_has_the_mends_for_its_absence(monkeypatch: Patch) -> None:
    """A GPU cannot be had here: the package's own switch is set, and nothing may be led to the CPU."""
    distributed = distrib_optimizer.DistributedOptimizer
    monkeypatch.setattr(distributed, "_set_main_param_and_optimizer_states", core.UPSTREAM["adam-step"])
    monkeypatch.delitem(core.UPSTREAM, "adam-step")
    monkeypatch.delattr(moe_utils, "te_general_gemm")
    monkeypatch.setattr(platform, "HAS_CUDA", True)
    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(platform.probe, "transformer_engine_parts", lambda: (False, False, False))
    synchronize = torch.cuda.synchronize
    platform.install()
    assert distributed._set_main_param_and_optimizer_states is not core.UPSTREAM["adam-step"]
    assert hasattr(moe_utils, "te_general_gemm") == MENDS["router-gemm"].applies()
    assert torch.cuda.synchronize is synchronize


def test_transformer_engine_on_a_gpu_is_left_as_it_is(monkeypatch: Patch) -> None:
    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(core, "mend", lambda: pytest.fail("mended"))
    platform.install()


def test_the_docs_have_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "upstream.md"
    assert markdown() in page.read_text(encoding="utf-8")
    for mend in MENDS.values():
        assert (Path(__file__).parents[2] / "gtpo_megatron" / mend.place).exists()
