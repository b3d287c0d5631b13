"""`data`: prompt sets."""

from typing import Literal

from pydantic import Field

from gtpo_megatron.config.section import Section


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
    few_shot: int = Field(
        0, ge=0, le=1000, description="worked examples from the same set, put before the question"
    )
    max_prompt_tokens: int = Field(
        512, ge=1, le=10_000_000, description="longer prompts are filtered and counted"
    )
    limit: int | None = Field(None, ge=1, description="use only the first N rows")
    shuffle: bool = Field(True, description="a new order every epoch, seeded by training.seed")
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="a malformed row stops the run, or is skipped and counted"
    )
