"""Facts that plans start from: GPUs (machines.yaml) and the published shapes of models (models.yaml)."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.layout import HFShape


@dataclass(frozen=True)
class GPU:
    """A GPU and its links. FLOP/s dense, bandwidths in bytes/s per GPU and direction."""

    name: str
    about: str
    memory: float  # bytes
    bf16: float
    fp8: float | None
    bandwidth: float
    host_bandwidth: float  # of the host's memory, a GPU's share
    nvlink: float
    network: float
    node: int  # GPUs of one NVLink domain
    power: float  # share of the full power limit, by which matrix products are slowed
    source: str


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the GPUs' figures: shares where no unit is named. machines.yaml has the meaning of each."""

    bf16_matmul: float
    fp8_matmul: float
    attention: float
    torch_attention: float
    memory: float
    host_memory: float
    nvlink: float
    network: float
    exposed_tensor: float
    exposed_context: float
    exposed_data: float
    exposed_expert: float
    exposed_pipeline: float
    eager_traffic: float
    routed_element_ps: float
    prefill_matmul: float
    decode_memory: float
    decode_base_ms: float
    decode_layer_us: float
    all_reduce_us: float
    all_reduce_network_us: float
    refit_share: float
    rl_decode: float
    rl_fill: float
    step_overhead_s: float
    checkpoint_node_gb_s: float


@dataclass(frozen=True)
class Latent:
    """DeepSeek's latent attention: ranks of the compressed queries (0: not compressed) and keys and values, in elements."""

    q_rank: int
    kv_rank: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Sliding:
    """Every `every`-th layer attends to the whole context, the others to `window` tokens."""

    every: int
    window: int


@dataclass(frozen=True)
class Model:
    """The sizes that decide a model's work and memory; a superset of `HFShape`, by which families we do not train are planned."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn: int = 0
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0  # in a mixture of experts, the layers before the experts begin
    mla: Latent | None = None
    sliding: Sliding | None = None
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def query_width(self) -> int:
        return self.heads * (self.head_dim + (self.mla.rope_dim if self.mla else 0))

    @property
    def value_width(self) -> int:
        return self.heads * (self.mla.value_dim if self.mla else self.head_dim)

    @property
    def attention_parameters(self) -> int:
        """Of the projections of one layer."""
        if self.mla is None:
            return self.hidden * (2 * self.query_width + 2 * self.kv_heads * self.head_dim)
        m = self.mla
        queries = m.q_rank * (self.hidden + self.query_width) if m.q_rank else self.hidden * self.query_width
        compress = self.hidden * (m.kv_rank + m.rope_dim)
        expand = m.kv_rank * self.heads * (self.head_dim + m.value_dim)
        return queries + compress + expand + self.value_width * self.hidden

    @property
    def layer_norms(self) -> int:
        """Parameters of a layer's norms."""
        return 2 * self.hidden + self.head_norms

    @property
    def head_norms(self) -> int:
        """Those of them that norm each head's queries and keys."""
        return 2 * self.head_dim * self.qk_norm

    @property
    def layer_biases(self) -> int:
        """Parameters of a layer's biases."""
        return (self.query_width + 2 * self.kv_heads * self.head_dim) * self.qkv_bias

    @property
    def router_parameters(self) -> int:
        """Of all layers."""
        return self.expert_layers * self.hidden * self.experts

    @property
    def cache_elements(self) -> int:
        """Elements of the KV cache for one token, all layers."""
        each = self.mla.kv_rank + self.mla.rope_dim if self.mla else 2 * self.kv_heads * self.head_dim
        return self.layers * each

    @property
    def dense_parameters(self) -> int:
        """Of all layers without routed experts and without embeddings."""
        feed_forward = (self.layers - self.expert_layers) * 3 * self.hidden * self.ffn
        shared = self.expert_layers * self.hidden * 3 * self.shared_ffn
        return self.layers * self.attention_parameters + feed_forward + shared + self.router_parameters

    @property
    def expert_parameters(self) -> int:
        """Of the routed experts of all layers."""
        return self.expert_layers * self.experts * 3 * self.hidden * self.expert_ffn

    @property
    def active_expert_parameters(self) -> int:
        """Of the routed experts that one token passes."""
        return self.expert_layers * self.experts_per_token * 3 * self.hidden * self.expert_ffn

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model but for norms and biases, which are below 0.01%."""
        heads = (1 if self.tied else 2) * self.head_parameters
        return self.dense_parameters + self.expert_parameters + heads

    def visible(self, context: float) -> float:
        """Tokens that a query attends to, causally, averaged over the layers and over the positions of a context of that length."""
        whole = context / 2
        if self.sliding is None:
            return whole
        share = 1 / self.sliding.every
        return share * whole + (1 - share) * min(self.sliding.window, whole)


def of_shape(shape: HFShape, name: str) -> Model:
    """The model of a checkpoint's config.json."""
    return Model(
        name,
        shape.layers,
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.vocab,
        ffn=0 if shape.experts else shape.ffn,
        tied=shape.tied,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        expert_ffn=shape.expert_ffn,
        qk_norm=shape.qk_norm,
        qkv_bias=shape.qkv_bias,
    )


def published_shape(path: str) -> HFShape | None:
    """The shape of a hub name that models.yaml knows, of a family that is trained here; None for any other path.

    Position limits are not among the published sizes; a plan has no use for them, and the shape says 0.
    """
    model = _models().get(_key(path.rpartition("/")[2]))
    architecture = model and next((a for start, a in _FAMILIES.items() if model.name.startswith(start)), None)
    if model is None or architecture is None:
        return None
    mixture = "Qwen3MoeForCausalLM" if model.experts else architecture
    return HFShape(
        architecture=mixture,
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn,
        vocab=model.vocab,
        max_positions=0,
        tied=model.tied,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        experts=model.experts,
        experts_per_token=model.experts_per_token,
        expert_ffn=model.expert_ffn,
    )


_FAMILIES = {
    "Llama-3": "LlamaForCausalLM",
    "SmolLM2": "LlamaForCausalLM",
    "Qwen2.5": "Qwen2ForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
}


def find_gpu(name: str) -> GPU:
    """A GPU by its name or an alias, in any case. Raises UserError with the nearest name."""
    return _find(name, _gpus(), "GPU")


def gpu_of_device(device: str) -> GPU | None:
    """The GPU that the driver calls so; None where machines.yaml has none of exactly that name."""
    rows = _read("machines.yaml")["gpus"]
    return next((find_gpu(name) for name, row in rows.items() if device in row["devices"]), None)


def find_model(name: str) -> Model:
    """A model by its hub name, or the spelling of a published table. Raises UserError with the nearest name."""
    return _find(name.rpartition("/")[2], _models(), "model")


def default_gpu() -> str:
    """The first of machines.yaml."""
    return gpu_names()[0]


def gpu_names() -> list[str]:
    """All of machines.yaml, in its order."""
    return list(_read("machines.yaml")["gpus"])


def efficiency() -> "Efficiency":
    """What is reached of the GPUs' figures: machines.yaml, where each has its source."""
    return Efficiency(**_read("machines.yaml")["efficiency"])


def _find(name: str, table: dict[str, Any], what: str) -> Any:
    key = _key(name)
    if key in table:
        return table[key]
    near = get_close_matches(key, table, 1, cutoff=0.5)
    known = ", ".join(dict.fromkeys(entry.name for entry in table.values()))
    hint = f"; did you mean {table[near[0]].name}?" if near else "."
    raise UserError(f"{what} {name!r} is not known{hint} Known: {known}")


def _key(name: str) -> str:
    """Spellings of one name are one key: 'GPT OSS 120B', 'gpt-oss-120b'; what says how it was tuned is left out."""
    plain = re.sub(r"[\s_-]+", "-", name.strip().lower())
    return re.sub(r"-(instruct|base|chat|it)(-\d{4})?$", "", plain)


@cache
def _read(file: str) -> dict[str, Any]:
    return yaml.safe_load(files("gtpo_megatron.plan").joinpath(file).read_text(encoding="utf-8"))


@cache
def _gpus() -> dict[str, GPU]:
    table = {}
    for name, row in _read("machines.yaml")["gpus"].items():
        fp8 = row["fp8_tflops"]
        gpu = GPU(
            name,
            row["about"],
            memory=row["memory_gib"] * 2**30,
            bf16=row["bf16_tflops"] * 1e12,
            fp8=None if fp8 is None else fp8 * 1e12,
            bandwidth=row["memory_gb_s"] * 1e9,
            host_bandwidth=row["host_gb_s"] * 1e9,
            nvlink=row["nvlink_gb_s"] * 1e9,
            network=row["network_gb_s"] * 1e9,
            node=row["node_gpus"],
            power=row["power"],
            source=row["source"],
        )
        table |= {_key(alias): gpu for alias in [name, *row["aliases"]]}
    return table


@cache
def _models() -> dict[str, Model]:
    table = {}
    for name, row in _read("models.yaml").items():
        sizes = {key: value for key, value in row.items() if key not in ("aliases", "mla", "sliding")}
        model = Model(name, **sizes)
        if "mla" in row:
            model = replace(model, mla=Latent(**row["mla"]))
        if "sliding" in row:
            model = replace(model, sliding=Sliding(**row["sliding"]))
        table |= {_key(alias): model for alias in [name, *row.get("aliases", [])]}
    return table
