"""What a plan is made of: how a model is spread over GPUs, and what a replica does in a step."""

from dataclasses import dataclass
from typing import Literal

from gtpo_megatron.plan.flop import Pass

Precision = Literal["bf16", "fp8"]
Recompute = Literal["none", "selective", "matmuls", "full"]
# Additional forward operations of (matrix products, attention), as shares of one forward pass. `selective` is Megatron's (the
# core attention), `matmuls` torchtitan's selective checkpointing by operations (every second product)
AGAIN: dict[Recompute, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "selective": (0.0, 1.0),
    "matmuls": (0.5, 0.0),
    "full": (1.0, 1.0),
}


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs, and by which ways they exchange what they must."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = True  # between products each tensor-parallel rank holds its part of the tokens
    distributed: bool = True  # the optimizer: gradients scattered, parameters gathered
    sharded: bool = False  # parameters too (FSDP): gathered for every micro-batch
    ring: bool = True  # keys and values of context-parallel ranks go round (Transformer Engine), else they are gathered
    overlap_gradients: bool = True  # summed over replicas while the backward pass runs
    overlap_parameters: bool = True  # gathered while the next step begins
    once_per_node: bool = False  # a token crosses to a node once, however many experts it has there (DeepEP)

    @property
    def data(self) -> int:
        """Replicas of the model."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, experts aside."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts; one where experts are spread wider than there are ranks, in a published run split in two."""
        return max(1, self.gpus // (self.pipeline * self.expert * self.expert_tensor))

    @property
    def expert_tensor(self) -> int:
        """Tensor parallelism inside an expert: none once experts are spread over ranks."""
        return 1 if self.expert > 1 else self.tensor


@dataclass(frozen=True)
class Work:
    """What a replica does in a step."""

    row: int  # tokens of a sequence, which attention sees
    rows: float  # of a micro-batch
    micro_batches: float
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    eager: bool = False  # no fused kernels
    torch_attention: bool = False  # torch's attention instead of Transformer Engine's
    forward_only: bool = False
    frozen: bool = False  # weights are not trained (LoRA): no gradients of theirs, and no Adam; adapters count as nothing
    offload: bool = False  # Adam's state is in host memory, and the host computes its update
    answered: float = 1.0  # share of the tokens whose probabilities the loss asks for: those of completions

    @property
    def kind(self) -> Pass:
        """What a pass computes."""
        return "forward" if self.forward_only else "frozen" if self.frozen else "training"

    @property
    def tokens(self) -> float:
        """Of a micro-batch, on all its context-parallel ranks."""
        return self.rows * self.row
