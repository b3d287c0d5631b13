"""What emulated FP8 does to a real model's log-probabilities and steps: python -m tests.te.real_model MODEL PROMPTS OUTPUT

PROMPTS: a .jsonl file with `question` (GSM8K's). The model samples completions; every number format then scores them and
trains on them. Over stand-ins for Transformer Engine's kernels, on a CPU: rounding and scaling are the formats' own, and
products are summed in float32, as on an H100 or better. Nothing is said of speed or memory.
"""

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import precision
from gtpo_megatron.trajectories.record import Trajectory
from tests.parallel.pool import RankPool
from tests.te import standin

WORK = precision.Work(groups=2, group_size=4, completion=64, micro_batch_tokens=2048, steps=3)


def sampled(model: Path, questions: Sequence[str], work: precision.Work) -> list[Trajectory]:
    """Completions of the model itself at temperature 1, in float32. Rewards are drawn: what is compared is arithmetic."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rewards = np.random.default_rng(0)
    made = []
    for group, question in enumerate(questions):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            rows = policy.generate(
                prompt.repeat(work.group_size, 1),
                attention_mask=torch.ones_like(prompt).repeat(work.group_size, 1),
                do_sample=True,
                top_k=0,
                max_new_tokens=work.completion,
                pad_token_id=tokenizer.eos_token_id,
            )[:, prompt.shape[1] :]
        drawn = rewards.permutation(work.group_size) / work.group_size
        for index, row in enumerate(rows.tolist()):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            made.append(
                replace(
                    precision.batch(work, 1000)[0],
                    group=group,
                    index=index,
                    prompt_ids=prompt[0].numpy().astype(np.int32),
                    token_ids=np.array(row[:end], np.int32),
                    logprobs=np.zeros(end, np.float32),
                    token_versions=np.zeros(end, np.int32),
                    reward=float(drawn[index]),
                    advantage=float(drawn[index] - drawn.mean()),
                    prefix=0,
                    suffix=0,
                )
            )
    return made


def table(measured: dict[str, precision.Measured]) -> str:
    """A row for each format, as Markdown."""
    baseline = measured[precision.BASELINE]
    lines = [
        "| format | mean abs gap | 99% below | largest | signed mean | losses of three steps | gradient norms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in measured.items():
        gap = precision.gap(row.logprobs, baseline.logprobs)
        gaps = " | ".join(f"{gap[key]:.4f}" for key in ("mean_abs", "p99_abs", "max_abs", "mean"))
        losses, norms = (
            ", ".join(f"{value:.4f}" for value in values) for values in (row.losses, row.grad_norms)
        )
        lines.append(f"| `{name}` | {gaps} | {losses} | {norms} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path, help="the table, as Markdown; written after every format")
    parser.add_argument("--formats", nargs="+", choices=precision.VARIANTS, default=list(precision.VARIANTS))
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text("utf-8").splitlines()[: WORK.groups]
    questions = [json.loads(line)["question"] for line in lines]
    with multiprocessing.get_context("spawn").Pool(1) as process:  # its memory is given back
        trajectories = process.apply(sampled, (arguments.model, questions, WORK))
    measured = {}
    pool = RankPool(standin.install)
    for name in precision.VARIANTS:
        if name != precision.BASELINE and name not in arguments.formats:
            continue
        (measured[name],) = pool.run(1, precision.measure, name, arguments.model, WORK, trajectories)
        print(name, measured[name].losses, flush=True)
        tokens = sum(len(t.token_ids) for t in trajectories)
        text = f"{len(trajectories)} completions, {tokens} tokens\n\n{table(measured)}\n"
        arguments.output.write_text(text, "utf-8")
    pool.close()
    print(arguments.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
