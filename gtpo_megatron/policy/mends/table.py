"""The table of all mends: of what, on which versions, and what would happen without; docs/upstream.md shows it.

tests/policy/test_mends.py runs upstream's own code beside each entry, with the versions that are installed: a mend that is
missing fails there, and so does one that a newer version has made idle.
"""

from dataclasses import dataclass
from importlib.metadata import version

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Mend:
    """One fault of a library, and the file that mends it."""

    library: str  # name of the distribution
    versions: str  # where it is mended, as far as the pinned versions tell: PEP 440, "" for all
    symptom: str  # what happens without it
    place: str  # below gtpo_megatron/

    def applies(self) -> bool:
        """Whether the installed version is one of those that have the fault."""
        return SpecifierSet(self.versions).contains(version(self.library), prereleases=True)


MENDS: dict[str, Mend] = {
    "bridge-import": Mend(
        "megatron-bridge",
        "",
        "`import megatron.bridge` fails where Transformer Engine is not installed: some modules import it at their top",
        "policy/platform.py",
    ),
    "contiguous-scatter": Mend(
        "megatron-bridge",
        "<0.6",
        "shards are scattered as views; gloo sends their memory as it lies, and o_proj and down_proj load wrong",
        "policy/mends/bridge.py",
    ),
    "expert-gather": Mend(
        "megatron-bridge",
        "<0.6",
        "the expert's number is looked for behind `.weight`, as grouped experts are named; local layers cannot be exported",
        "policy/mends/bridge.py",
    ),
    "expert-names": Mend(
        "megatron-bridge",
        "<0.6",
        "only grouped experts are renumbered; with local layers each expert-parallel rank loads the first rank's experts",
        "policy/mends/bridge.py",
    ),
    "peft-stand-ins": Mend(
        "megatron-bridge",
        "",
        "without Transformer Engine, LoRA takes Megatron-Core's empty stand-ins for classes of layers",
        "policy/adapters.py",
    ),
    "gathered-norm": Mend(
        "megatron-bridge",
        "",
        "LoRA with sequence parallelism takes gathered norms from Transformer Engine, which drops their gradient: silently wrong",
        "policy/adapters.py",
    ),
    "peft-recompute": Mend(
        "megatron-bridge",
        "",
        "models that LoRA's recomputation has seen are known by id(), which a later model may have again",
        "policy/adapters.py",
    ),
    "vocabulary-padding": Mend(
        "megatron-bridge",
        "<0.6",
        "the model's vocabulary is padded to a multiple of tensor parallelism, and the checkpoint's is then refused",
        "policy/mends/bridge.py",
    ),
    "shared-embeddings": Mend(
        "megatron-bridge",
        "<0.6",
        "tied embeddings with a virtual pipeline: the last stage looks for the output layer in its first chunk; AssertionError",
        "policy/mends/bridge.py",
    ),
    "paged-stash": Mend(
        "megatron-core",
        ">=0.17",
        "mixtures of experts import Triton, of which they call nothing; the import fails where it is not installed",
        "policy/mends/core.py",
    ),
    "router-gemm": Mend(
        "megatron-core",
        "<0.17",
        "NameError in the router of a mixture of experts: a name is defined with Transformer Engine alone",
        "policy/mends/core.py",
    ),
    "expert-shards": Mend(
        "megatron-core",
        "<0.17",
        "grouped experts that are split over tensor ranks: of each weight one shard counts in the gradient's norm, so it is clipped "
        "too little",
        "policy/mends/engine.py",
    ),
    "expert-state": Mend(
        "megatron-core",
        "<0.17",
        "grouped experts in FP8 without state (tensorwise, blockwise): TypeError at the first checkpoint",
        "policy/mends/engine.py",
    ),
    "fp8-main-weights": Mend(
        "megatron-bridge",
        "",
        "with weights in FP8 the distributed optimizer starts from what these were made with, not from what is loaded: uninitialised memory",
        "policy/mends/engine.py",
    ),
    "fp8-first-scale": Mend(
        "megatron-core",
        "",
        "with weights kept in FP8 by delayed scaling, the memory that they are made of, before any is loaded, decides the first scale",
        "policy/mends/engine.py",
    ),
    "adam-step": Mend(
        "megatron-core",
        "",
        "the distributed optimizer on torch's AdamW: KeyError 'step' at the load, and one step tensor for all parameters",
        "policy/mends/core.py",
    ),
    "host-counts": Mend(
        "megatron-core",
        "",
        "token counts of experts become host integers only where they were on a GPU; without one, splits are tensors",
        "policy/without_cuda.py",
    ),
    "host-offload": Mend(
        "megatron-core",
        "",
        "optimizer offload copies the parameters that are on a GPU, and looks for a copy of each: KeyError without one",
        "policy/without_cuda.py",
    ),
    "gradient-alias": Mend(
        "megatron-core",
        "",
        "an fp32 update leaves `parameter.grad` an alias of the gradient buffer: the next backward pass counts itself twice",
        "policy/optimizer.py",
    ),
    "llama3-rope": Mend(
        "megatron-core",
        "",
        "three of the four parameters of Llama-3 scaling are fixed at Llama 3.1's: other checkpoints run silently wrong",
        "policy/model.py",
    ),
    "results-queue": Mend(
        "megatron-core",
        "",
        "results of a checkpoint's writer pass through a manager process, which outlives a trainer that is killed",
        "policy/checkpoint/state.py",
    ),
    "writer-processes": Mend(
        "megatron-core",
        "<0.17",
        "a process is forked for each file of a checkpoint; those of a killed trainer go on writing",
        "policy/checkpoint/state.py",
    ),
    "storage-pickle": Mend(
        "megatron-core",
        ">=0.17",
        "torch's loader of storages is replaced; pickled tensors name the new one, and an SGLang server dies of it",
        "rollout/sglang",
    ),
    "load-errors": Mend(
        "torch",
        "",
        "a checkpoint that cannot be read raises a BaseException, which no `except Exception` sees",
        "policy/checkpoint/state.py",
    ),
}


def markdown() -> str:
    """The table for the docs."""
    rows = [
        f"| {name} | {mend.library} {mend.versions or '(all)'} | {mend.symptom} | `gtpo_megatron/{mend.place}` |"
        for name, mend in MENDS.items()
    ]
    return "\n".join(["| mend | where | without it | file |", "| --- | --- | --- | --- |", *rows]) + "\n"
