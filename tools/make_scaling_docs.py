"""Write the tables of docs/scaling.md: the fastest layout of four models on 8 to 1,024 H100, by the planner."""

import re
from pathlib import Path

from gtpo_megatron.config import RunConfig
from gtpo_megatron.config.loading import load_recipe
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import read_shape
from gtpo_megatron.plan.estimate import Plan, completion_lengths, search
from gtpo_megatron.plan.facts import default_gpu, efficiency, find_gpu

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RECIPE = ROOT / "recipes" / "large" / "llama-3.1-70b-math-bf16.yaml"
MODELS = ("Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct", "Llama-3.1-70B-Instruct", "Qwen3-30B-A3B")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
HEADER = (
    "| model | GPUs | tensor, pipeline, virtual, context, expert, recompute | GiB | training s | sampling s | step s "
    "| tokens/s/GPU training | MFU training | training limited by | step limited by |"
)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def row(model: str, gpus: int) -> str:
    """One line of the table; the batch is the recipe's, whatever the number of GPUs."""
    config = load_recipe(RECIPE, [f"model.path={ROOT / 'tests' / 'fixtures' / 'configs' / model}"])
    best = fastest(config, gpus)
    columns = HEADER.count("|") - 1
    if best is None:
        return f"| {model} | {gpus} | nothing fits |" + " |" * (columns - 3)
    return f"| {model} | {gpus} | " + " | ".join(cells(best)) + " |"


def fastest(config: RunConfig, gpus: int) -> Plan | None:
    """The first of a search that fits."""
    shape, lengths = read_shape(config.model.path), completion_lengths(config, None)
    try:
        found = search(config, shape, gpus, find_gpu(default_gpu()), lengths, efficiency())
    except UserError:  # no server stands on so few GPUs
        return None
    return next((candidate.plan for candidate in found if candidate.plan.fits), None)


def cells(plan: Plan) -> list[str]:
    """What is shown of a plan."""
    parallel, step, training = plan.parallel, plan.step, plan.step.training.total
    sizes = (
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline or 1,
        parallel.context,
        parallel.expert,
    )
    slower = "sampling" if (step.sampling or 0) > training + step.transfer else "training and transfer"
    return [
        f"{', '.join(map(str, sizes))}, {plan.recompute}",
        f"{plan.worst.total / 2**30:.0f}",
        f"{training:.1f}",
        f"{step.sampling:.0f}",
        f"{step.step:.0f}",
        f"{step.tokens / training / plan.gpus:.0f}",
        f"{step.flop_share:.0%}",
        step.training.limit,
        slower,
    ]


def updated(text: str) -> str:
    """The page with the table as the program gives it now."""
    rule = "|" + " --- |" * (HEADER.count("|") - 1)
    lines = [HEADER, rule, *(row(model, gpus) for model in MODELS for gpus in GPUS)]
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", text)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
