"""The run's configuration: frozen, typed sections; every rule that needs no model is checked here, within seconds."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The policy: a Hugging Face checkpoint."""

    path: str = Field(description="Hugging Face checkpoint directory or hub name")
    tokenizer: str | None = Field(
        None, description="tokenizer directory or hub name; the model's own by default"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="parameter and activation type")
    fp8: Literal["none", "hybrid", "e4m3"] = Field(
        "none", description="Transformer Engine FP8 recipe; needs CUDA and bf16"
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="layer implementation: Transformer Engine where it is installed, else Megatron-Core's local layers",
    )


class ParallelConfig(Section):
    """How the policy is spread over ranks. Data parallelism is what remains of the world size."""

    tensor: int = Field(1, ge=1, description="ranks that share every matrix")
    pipeline: int = Field(1, ge=1, description="stages that share the layers")
    virtual_pipeline: int | None = Field(
        None, ge=2, description="model chunks per pipeline rank (interleaved schedule)"
    )
    context: int = Field(1, ge=1, description="ranks that share every sequence")
    expert: int = Field(1, ge=1, description="ranks that share the experts of a mixture")
    sequence: bool = Field(False, description="sequence parallelism; needs tensor > 1")

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence: true needs parallel.tensor > 1")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline needs parallel.pipeline > 1")
        return self


class FieldMap(Section):
    """Which columns of the data set hold what."""

    question: str = Field("question", description="column with the question")
    answer: str = Field("answer", description="column with the reference answer")
    solution: str | None = Field(
        None, description="column with a worked solution (SFT); default: the answer alone"
    )
    id: str | None = Field(None, description="column with a unique row id; default: the row number")


class DataConfig(Section):
    """A prompt set."""

    path: str = Field(
        description="hub name, local .jsonl/.json/.parquet file, or a folder holding <split>.jsonl or .parquet"
    )
    name: str | None = Field(None, description="hub configuration name, e.g. main")
    split: str = Field("train", description="split of the set, or name of the file in a folder")
    format: Literal["gsm8k", "math", "fields"] = Field(
        "fields", description="how a row gives question, solution and answer"
    )
    fields: FieldMap = Field(FieldMap(), description="columns, for format: fields; `id` for any format")
    system_prompt: str | None = Field(
        None, description="default: the paper's reasoning/answer instruction; '' for none"
    )
    chat: bool = Field(True, description="render with the tokenizer's chat template; false: plain text")
    few_shot: int = Field(0, ge=0, description="worked examples from the same set, put before the question")
    max_prompt_tokens: int = Field(512, ge=1, description="longer prompts are filtered and counted")
    limit: int | None = Field(None, ge=1, description="use only the first N rows")
    shuffle: bool = Field(True, description="a new order every epoch, seeded by training.seed")
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="a malformed row stops the run, or is skipped and counted"
    )


class RewardTerm(Section):
    """One weighted term of the reward."""

    kind: Literal["paper_format", "paper_correctness", "math_verify", "format", "python"] = Field(
        description="one of the built-in terms, or python for a function of yours"
    )
    name: str | None = Field(None, description="name in the metrics; default: the kind")
    weight: float = Field(1.0, description="factor of the term in the reward")
    function: str | None = Field(None, description="package.module:function, for kind python")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")

    @model_validator(mode="after")
    def _function(self) -> Self:
        if (self.kind == "python") != (self.function is not None):
            raise ValueError("rewards.terms[].function goes with kind: python, and only with it")
        return self


class RewardConfig(Section):
    """What a completion is worth, and how its scoring is bounded."""

    terms: tuple[RewardTerm, ...] = Field(
        (RewardTerm(kind="paper_format"), RewardTerm(kind="paper_correctness")),
        description="summed with their weights; default: the paper's reward",
    )
    workers: int = Field(2, ge=1, description="worker processes")
    timeout_s: float = Field(10.0, gt=0, description="limit for scoring one completion")
    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="above this share of failed scorings in a step the run stops"
    )


class SGLangConfig(Section):
    """SGLang servers: given by URL, or started by the trainer on this machine."""

    urls: tuple[str, ...] = Field((), description="servers that already run")
    urls_file: str | None = Field(None, description="file with one URL a line; read again when it changes")
    servers: int = Field(1, ge=1, description="servers to start here when no URLs are given")
    tensor: int = Field(1, ge=1, description="tensor parallelism of each started server")
    first_gpu: int | None = Field(
        None, ge=0, description="GPU of the first started server; default: the first that no rank here has"
    )
    python: str | None = Field(
        None, description="interpreter of SGLang's environment; default: .venv-sglang/bin/python"
    )
    router: bool = Field(False, description="put sglang-router before the servers for /generate")
    host: str = Field("127.0.0.1", description="address that started servers listen on")
    api_key: str | None = Field(None, description="needed when host is not loopback; may be env:NAME")
    start_timeout_s: float = Field(600.0, gt=0, description="how long a server may take to answer at first")
    request_timeout_s: float = Field(600.0, gt=0, description="limit for one completion's request")
    concurrency: int = Field(64, ge=1, description="completions in flight per server")
    weight_transfer: Literal["distributed", "tensor", "disk"] = Field(
        "distributed", description="by a process group, in the request (or CUDA IPC), or through files"
    )
    bucket_mb: int = Field(512, ge=1, description="size of a transfer bucket, MiB")
    verify_every: int = Field(
        10, ge=0, description="mismatch certificate every K weight versions; 0: only after start"
    )
    checksums: Literal["never", "start", "certificate"] = Field(
        "start",
        description="compare each of the servers' tensors with the trainer's after start, or with every certificate; "
        "the servers read them from the run's directory",
    )
    max_logprob_gap: float | None = Field(
        None, gt=0, description="stop above this mean |difference|; default by dtype"
    )
    group_timeout_s: float | None = Field(
        None, gt=0, description="a group not done by then is aborted and recycled"
    )
    partial: bool = Field(
        False, description="continue completions after an update, a timeout or the end of their batch"
    )
    no_server_timeout_s: float = Field(
        600.0, gt=0, description="how long to wait with no server left before saving and stopping"
    )
    args: tuple[str, ...] = Field((), description="further arguments of sglang.launch_server")

    def gpus(self, local_ranks: int) -> range:
        """The GPUs of the started servers, `tensor` each in turn, on a machine with so many ranks of the trainer."""
        first = local_ranks if self.first_gpu is None else self.first_gpu
        return range(first, first + self.servers * self.tensor)


class DynamicSampling(Section):
    """Replace groups without signal (all rewards equal)."""

    enabled: bool = Field(False, description="sample new prompts in their place")
    max_rounds: int = Field(
        3, ge=1, description="rounds of replacement before the step goes on with what it has"
    )


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="transformers' generation in the trainer, or SGLang servers"
    )
    prompts_per_step: int = Field(8, ge=1, description="groups in a step's batch")
    group_size: int = Field(8, ge=2, description="completions of each prompt (G)")
    max_new_tokens: int = Field(512, ge=1, description="tokens of a completion at most")
    temperature: float = Field(1.0, gt=0, description="divides the logits, in sampling and in the loss")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: off")
    batch_size: int = Field(128, ge=1, description="embedded engine: completions generated at once")
    staleness: int = Field(0, ge=0, description="how many updates old the sampling weights may be")
    oversample: float = Field(
        1.0,
        ge=1,
        description="sample this many times the prompts, keep the first finished, put the others back",
    )
    dynamic_sampling: DynamicSampling = Field(
        DynamicSampling(), description="replacement of groups without signal"
    )
    sglang: SGLangConfig = SGLangConfig()


class GateConfig(Section):
    """The entropy filter of completions."""

    mode: Literal["paper", "always", "only_negative", "off"] = Field(
        "paper", description="which completions the filter may drop: docs/algorithm.md"
    )
    threshold: float = Field(0.6931471805599453, gt=0, description="nats; ln 2 is provable")


class ImportanceConfig(Section):
    """Truncated importance sampling between sampler and trainer."""

    level: Literal["off", "token", "sequence"] = Field(
        "off", description="weigh every token, or every completion as a whole"
    )
    cap: float = Field(2.0, gt=0, description="the largest weight")


class AlgorithmConfig(Section):
    """The objective."""

    name: Literal["gtpo", "grpo", "sft"] = Field("gtpo", description="the objective: GTPO, or a baseline")
    compat: Literal["paper", "reference"] = Field(
        "paper", description="reference: reproduce the authors' implementation"
    )
    gamma: float = Field(0.1, ge=0, description="weight of the entropy term in the GTPO advantage")
    positive_weight: float = Field(2.0, ge=0, description="weight of conflict tokens in positive completions")
    gate: GateConfig = GateConfig()
    clip_low: float = Field(0.2, ge=0, description="GRPO: lower clipping range")
    clip_high: float = Field(0.2, ge=0, description="GRPO: upper clipping range")
    kl_beta: float = Field(
        0.0, ge=0, description="GRPO: weight of the k3 KL term; 0 loads no reference policy"
    )
    updates_per_batch: int = Field(
        1, ge=1, description="optimizer updates on each batch; above 1 pi_old is needed"
    )
    old_logprobs: Literal["trainer", "sampler"] = Field(
        "trainer", description="source of pi_old when it is needed"
    )
    importance: ImportanceConfig = ImportanceConfig()

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.compat == "reference" and self.name != "gtpo":
            raise ValueError("algorithm.compat: reference goes with algorithm.name: gtpo")
        if self.kl_beta and self.name != "grpo":
            raise ValueError(
                "algorithm.kl_beta is a term of GRPO; GTPO and SFT have no reference policy (algorithm.name: grpo)"
            )
        return self


class OptimizerConfig(Section):
    """Megatron's Adam with warm-up and decay."""

    lr: float = Field(1e-6, gt=0, description="learning rate after warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="decay of the learning rate over all updates"
    )
    warmup_steps: int = Field(0, ge=0, description="updates in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: off")
    distributed: bool = Field(False, description="shard the optimizer state over data-parallel ranks")


class TrainingConfig(Section):
    """The loop."""

    steps: int = Field(ge=1, description="steps of the run: batches sampled and trained on")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="token budget of a packed micro-batch, prompts included"
    )
    sft_batch_size: int = Field(16, ge=1, description="SFT: examples per step")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in the backward pass, to save memory"
    )
    seed: int = Field(0, ge=0, description="of the prompts' order, and of sampling where the engine can")
    deterministic: bool = Field(True, description="deterministic kernels where there is a choice")
    max_bad_steps: int = Field(
        3, ge=1, description="stop after this many steps in a row with NaN or infinite gradients"
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over data-parallel ranks during the backward pass"
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints at multiples of this step are never deleted"
    )
    asynchronous: bool = Field(False, description="write the weights while training goes on")
    on_corrupt: Literal["error", "previous"] = Field(
        "previous", description="a damaged newest checkpoint: stop, or warn and use the one before"
    )
    export_hf: bool = Field(True, description="write a Hugging Face directory at the end")


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write tensorboard/ in the run's directory")
    wandb: bool = Field(False, description="log to Weights & Biases; needs its package")
    wandb_project: str = Field("gtpo-megatron", description="project there")
    progress: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="a live display, a line a step, or nothing; auto: live in a terminal"
    )


class EvaluationConfig(Section):
    """Greedy or sampled accuracy on held-out prompts."""

    data: DataConfig | None = Field(None, description="held-out prompts; none: no evaluation")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after training")
    samples: int = Field(1, ge=1, description="completions per prompt; 1 is greedy")
    max_new_tokens: int | None = Field(None, ge=1, description="default: rollout.max_new_tokens")


class RunConfig(Section):
    """A whole run: what a recipe file holds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    dir: str = Field("runs", description="parent directory; the run writes to <dir>/<name>")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    rewards: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name
