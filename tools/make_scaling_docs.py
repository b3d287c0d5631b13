"""Write the table of docs/scaling.md and its plot: the fastest layout of four models on 8 to 1,024 H100, by the planner."""

import re
from functools import cache
from pathlib import Path

from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.estimate import completion_lengths
from gtpo_megatron.plan.facts import default_gpu, efficiency, find_gpu
from gtpo_megatron.scaling.growth import Point, doubled, grow, layout_words, plot, training_rate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
PLOT = ROOT / "docs" / "images" / "scaling.png"
RECIPE = ROOT / "recipes" / "large" / "llama-3.1-70b-math-bf16.yaml"
MODELS = ("Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "Llama-3.1-70B-Instruct", "Qwen3-30B-A3B")
GPUS = doubled(8, 1024)
HEADER = (
    "| model | GPUs | tensor, pipeline, virtual, context, expert, recompute | GiB | training s | sampling s | step s "
    "| tokens/s/GPU training | MFU training | training limited by | step limited by |"
)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


@cache
def point(model: str, gpus: int) -> Point:
    """The fastest plan; the batch is the recipe's, whatever the number of GPUs."""
    config = load_recipe(RECIPE, [f"model.path={ROOT / 'tests' / 'fixtures' / 'configs' / model}"])
    shape, lengths = read_shape(config.model.path), completion_lengths(config, None)
    return grow([gpus], config, shape, find_gpu(default_gpu()), lengths, efficiency())[0]


def row(model: str, gpus: int) -> str:
    """One line of the table."""
    plan = point(model, gpus).plan
    if plan is None:
        return f"| {model} | {gpus} | nothing fits |" + " |" * (HEADER.count("|") - 4)
    step, training = plan.step, plan.step.training
    cells = [
        *(layout_words(plan), f"{plan.worst.total / 2**30:.0f}"),
        *(f"{training.total:.2f}", f"{step.sampling:.0f}", f"{step.step:.0f}"),
        *(f"{training_rate(plan):.0f}", f"{step.flop_share:.0%}", training.limit, step.limit),
    ]
    return f"| {model} | {gpus} | " + " | ".join(cells) + " |"


def updated(text: str) -> str:
    """The page with the table as the program gives it now."""
    rule = "|" + " --- |" * (HEADER.count("|") - 1)
    lines = [HEADER, rule, *(row(model, gpus) for model in MODELS for gpus in GPUS)]
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", text)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plot({model: [point(model, gpus) for gpus in GPUS] for model in MODELS}, PLOT)
