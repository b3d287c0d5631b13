"""Prompts: questions rendered and tokenized as the policy will see them."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gtpo_megatron.config import DataConfig
from gtpo_megatron.data.formats import Example, parse_row
from gtpo_megatron.data.rows import read_rows, resolve_source
from gtpo_megatron.errors import UserError

SYSTEM_PROMPT = (
    "Work through the problem step by step, then state the final answer. "
    "Reply in exactly this form, with nothing before or after it:\n"
    "<reasoning>\nyour working\n</reasoning>\n<answer>\nthe final answer alone\n</answer>"
)
"""What the paper asks of the policy: reasoning, then the answer, each in its tags."""

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the rollout engine."""

    id: str
    question: str
    answer: str
    solution: str | None
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, and what became of its rows."""

    prompts: tuple[Prompt, ...]
    rows: int  # read, few-shot examples included
    too_long: int  # filtered: over data.max_prompt_tokens
    skipped: int  # malformed, with data.bad_rows: skip
    skipped_examples: tuple[str, ...]  # what was wrong with the first few of them
    long_solutions: int = 0  # filtered for supervised fine-tuning: see `with_solutions_within`
    neutralised: int = 0  # rows that spell a special token; their prompts have it as plain text

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever an id, a prompt token or the order changes; 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.id, prompt.prompt_ids)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Question:
    """One question for a server that has the tokenizer, as the turns of a chat and as plain text."""

    id: str
    question: str
    answer: str
    turns: tuple[dict[str, str], ...]  # role, content
    text: str


def load_questions(config: DataConfig) -> tuple[Question, ...]:
    """The questions of a data set without a tokenizer; nothing is left out for its length. See `load_prompts`.

    Raises:
        UserError: the set cannot be read, a row is malformed and `bad_rows` is error, or no question is left.
    """
    shots, examples, rows, mistakes = _shots_and_examples(config)
    if not examples:
        raise UserError(
            f"data.path: {_where(config)}: no question is left of {rows} rows ({len(mistakes)} malformed, "
            f"{config.few_shot} few-shot examples)"
        )
    system = SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
    return tuple(
        Question(
            example.id,
            example.question,
            example.answer,
            tuple(_turns(system, shots, example.question)),
            _plain_text(None, system, shots, example.question),
        )
        for example in examples
    )


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read a data set, render and tokenize its questions, and drop those over the token limit.

    Text of a row that spells a special token, such as <|im_end|>, must not close a turn: `neutral_text` breaks it.

    Few-shot examples are the set's first `few_shot` good rows; they are not prompts themselves.

    Raises:
        UserError: the set cannot be read; a row is malformed and `bad_rows` is error; the tokenizer has no chat
            template or no pad token; no prompt is left.
    """
    check_tokenizer(tokenizer, chat=config.chat)
    shots, examples, rows, mistakes = _shots_and_examples(config)
    system = SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
    render = _chat_text if config.chat else _plain_text
    special = _special_tokens(tokenizer)
    neutralised = sum(_neutral_example(example, special) != example for example in (*shots, *examples))
    shots = [_neutral_example(shot, special) for shot in shots]
    texts = [
        render(tokenizer, system, shots, neutral_text(example.question, special)) for example in examples
    ]
    # A chat template writes its own special tokens; plain text gets those that the tokenizer adds (a BOS).
    encoded = tokenizer(texts, add_special_tokens=not config.chat)["input_ids"] if texts else []
    prompts = tuple(
        Prompt(example.id, example.question, example.answer, example.solution, tuple(ids))
        for example, ids in zip(examples, encoded, strict=True)
        if len(ids) <= config.max_prompt_tokens
    )
    too_long = len(examples) - len(prompts)
    if not prompts:
        raise UserError(
            f"data.path: {_where(config)}: no prompt is left of {rows} rows ({len(mistakes)} malformed, {too_long} over "
            f"data.max_prompt_tokens = {config.max_prompt_tokens}, {config.few_shot} few-shot examples)"
        )
    return PromptSet(prompts, rows, too_long, len(mistakes), tuple(mistakes[:5]), neutralised=neutralised)


def solution_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Target of supervised fine-tuning: the solution and answer in the paper's format, then the end-of-turn token.

    Without a solution the answer stands in for the reasoning.
    """
    text = neutral_text(_formatted(prompt), _special_tokens(tokenizer))
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_of_turn_id(tokenizer)]


def with_solutions_within(prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, limit: int) -> PromptSet:
    """The prompts that have, with their solutions, at most `limit` tokens; `long_solutions` counts the others.

    Raises:
        UserError: none is left.
    """
    kept = tuple(
        prompt
        for prompt in prompts.prompts
        if len(prompt.prompt_ids) + len(solution_ids(prompt, tokenizer)) <= limit
    )
    if not kept:
        raise UserError(
            f"data.path: none of {len(prompts)} prompts has, with its solution, at most {limit} tokens, what "
            "training.micro_batch_tokens and the model's positions hold; raise training.micro_batch_tokens"
        )
    return replace(prompts, prompts=kept, long_solutions=len(prompts) - len(kept))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the assistant's turn: the chat template's own turn end, else EOS."""
    special = _special_tokens(tokenizer)
    template = tokenizer.chat_template or ""
    for token in _TURN_ENDS:
        if token in special and token in template:
            return special[token]
    return tokenizer.eos_token_id


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: EOS, and the turn and text ends that the vocabulary holds as special tokens. Sorted."""
    special = _special_tokens(tokenizer)
    stops = {special[token] for token in (*_TURN_ENDS, "<|endoftext|>") if token in special}
    return tuple(sorted(stops | {tokenizer.eos_token_id}))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """Raise UserError if the tokenizer lacks what training needs: EOS, pad, and a chat template where chat is asked."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    mend = "in its tokenizer_config.json (copy the tokenizer's folder, and name the copy as model.tokenizer)"
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name}: no EOS token, so no completion could end; set eos_token {mend}")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"tokenizer {name}: no pad token; set pad_token, to any special token that is not EOS, {mend}"
        )
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {name}: no chat template; set data.chat: false for plain text, or chat_template {mend}"
        )


def neutral_text(text: str, special: Collection[str]) -> str:
    """The text with a space behind the first character of each special token in it, so that it is read as plain text.

    A special token of one character is left out.
    """
    for token in sorted(special, key=len, reverse=True):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else "")
    return text


def _neutral_example(example: Example, special: Collection[str]) -> Example:
    solution = example.solution
    return replace(
        example,
        question=neutral_text(example.question, special),
        answer=neutral_text(example.answer, special),
        solution=None if solution is None else neutral_text(solution, special),
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _shots_and_examples(config: DataConfig) -> tuple[list[Example], list[Example], int, list[str]]:
    """(few-shot examples, the others, number of rows read, what is wrong with each bad one)."""
    examples, rows, mistakes = _read_examples(config)
    shots, examples = examples[: config.few_shot], examples[config.few_shot :]
    if len(shots) < config.few_shot:
        raise UserError(
            f"data.few_shot: {config.few_shot} examples, but {_where(config)} has {len(shots)} good rows"
        )
    return shots, examples, rows, mistakes


def _read_examples(config: DataConfig) -> tuple[list[Example], int, list[str]]:
    """(good rows, number of rows read, what is wrong with each bad one)."""
    examples, mistakes, rows = [], [], 0
    for number, row in read_rows(config):
        rows += 1
        try:
            examples.append(parse_row(config, number, row))
        except ValueError as error:
            mistake = f"{_where(config)}: row {number} {error}"
            if config.bad_rows == "error":
                raise UserError(
                    f"{mistake}. Mend the row, or set data.bad_rows: skip to go on without such rows"
                ) from None
            mistakes.append(mistake)
    return examples, rows, mistakes


def _where(config: DataConfig) -> str:
    source = resolve_source(config)
    return str(source) if source else f"{config.path} (split {config.split})"


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, system: str, shots: Sequence[Example], question: str
) -> str:
    turns = _turns(system, shots, question)
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: its chat template refuses the prompt: {error}. "
            "If it knows no system role, set data.system_prompt: ''"
        ) from error


def _turns(system: str, shots: Sequence[Example], question: str) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        turns.append({"role": "user", "content": shot.question})
        turns.append({"role": "assistant", "content": _formatted(shot)})
    return [*turns, {"role": "user", "content": question}]


def _plain_text(
    _: PreTrainedTokenizerBase | None, system: str, shots: Sequence[Example], question: str
) -> str:
    blocks = [system] if system else []
    blocks += [f"{shot.question}\n{_formatted(shot)}" for shot in shots]
    return "\n\n".join([*blocks, f"{question}\n"])


def _formatted(example: Example | Prompt) -> str:
    reasoning = example.answer if example.solution is None else example.solution
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{example.answer}\n</answer>"
