"""`evaluation`: held-out prompts, and the suites of `gtpo-megatron evaluate`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gtpo_megatron.config.data import DataConfig
from gtpo_megatron.config.section import Section


class EndpointConfig(Section):
    """An OpenAI-compatible server that `gtpo-megatron evaluate` samples from instead of rollout.engine."""

    url: str | None = Field(None, description="base URL, e.g. http://127.0.0.1:8000/v1; none: rollout.engine")
    model: str | None = Field(None, description="name of the model there; needed with url")
    api: Literal["chat", "completions"] = Field(
        "chat", description="/chat/completions, or /completions with the question as plain text"
    )
    api_key: str | None = Field(None, description="sent as a bearer token; may be env:NAME")
    concurrency: int = Field(16, ge=1, le=10_000, description="requests in flight")
    timeout_s: float = Field(600.0, gt=0, le=604_800, description="limit for one completion's request")
    attempts: int = Field(4, ge=1, le=100, description="failures of one request before the evaluation stops")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.url is None) != (self.model is None):
            raise ValueError("evaluation.endpoint.url and evaluation.endpoint.model go together")
        return self


class EvaluationConfig(Section):
    """Greedy or sampled accuracy on held-out prompts and suites."""

    data: DataConfig | None = Field(
        None, description="held-out prompts; with neither these nor suites no evaluation in training"
    )
    every: int = Field(
        0, ge=0, le=1_000_000_000, description="steps between evaluations; 0: only before and after training"
    )
    samples: int = Field(1, ge=1, le=10_000, description="completions per prompt; 1 is greedy")
    temperature: float | None = Field(
        None, ge=0, le=100, description="default: 0 with one sample, else rollout.temperature"
    )
    top_p: float = Field(1.0, ge=1e-6, le=1, description="nucleus sampling; 1: off")
    max_new_tokens: int | None = Field(
        None, ge=1, le=10_000_000, description="default: rollout.max_new_tokens"
    )
    seed: int | None = Field(
        None, ge=0, le=4_294_967_296, description="of the samples; default: training.seed + 1"
    )
    suites: tuple[str, ...] = Field(
        (),
        description="names in recipes/eval, or files: each is evaluated in training beside evaluation.data, and by "
        "`gtpo-megatron evaluate` in its place",
    )
    folder: str | None = Field(
        None, description="folder of local copies: a suite's set is read from <folder>/<name of the suite>"
    )
    k: tuple[int, ...] = Field(
        (), description="`gtpo-megatron evaluate`: k of pass@k and maj@k; default: 1, 2, 4, ... and samples"
    )
    endpoint: EndpointConfig = EndpointConfig()

    @model_validator(mode="after")
    def _distinct_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "evaluation.samples: several completions at evaluation.temperature 0 are all the same"
            )
        return self


class SuiteConfig(Section):
    """A suite's own file: a set, and what it says of sampling; what it leaves out is the recipe's."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in tables and of its folder")
    path: str = Field(description="hub name, local .jsonl/.json/.parquet file, or a folder")
    config: str | None = Field(None, description="hub configuration name")
    split: str = Field("test", description="split of the set, or name of the file in a folder")
    format: Literal["gsm8k", "math", "fields"] = Field("fields", description="as data.format")
    question: tuple[str, ...] = Field(("question",), min_length=1, description="columns; the first there is")
    answer: tuple[str, ...] = Field(("answer",), min_length=1, description="columns; the first there is")
    id: str | None = Field(None, description="column with a unique row id; default: the row number")
    limit: int | None = Field(None, ge=1, description="use only the first N rows")
    bad_rows: Literal["error", "skip"] = Field("error", description="as data.bad_rows")
    few_shot: int | None = Field(None, ge=0, le=1000, description="as data.few_shot")
    chat: bool | None = Field(None, description="as data.chat")
    system_prompt: str | None = Field(None, description="as data.system_prompt")
    max_prompt_tokens: int | None = Field(None, ge=1, description="as data.max_prompt_tokens")
    samples: int | None = Field(None, ge=1, le=10_000, description="as evaluation.samples")
    temperature: float | None = Field(None, ge=0, le=100, description="as evaluation.temperature")
    top_p: float | None = Field(None, ge=1e-6, le=1, description="as evaluation.top_p")
    max_new_tokens: int | None = Field(None, ge=1, description="as evaluation.max_new_tokens")
    seed: int | None = Field(None, ge=0, le=4_294_967_296, description="as evaluation.seed")
