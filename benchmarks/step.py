"""One whole training step on given completions: GTPO against GRPO with a KL term, the project's own and TRL's.

    python benchmarks/step.py

Every method starts from the same tiny model in float32 and takes the same prompts, completions and rewards; nothing is
sampled. A step is everything from rewards to updated weights: advantages (and GTPO's conflict runs), the passes that the
method needs, clipping, Adam. In units of one forward pass, with a backward pass counting two:

    gtpo             forward and backward                                              3
    grpo_on_policy   and a forward of the reference policy                             4
    grpo             and a forward for old log-probabilities                           5
    trl_on_policy, trl   the same two by TRL's GRPOTrainer                             4, 5

The units are counted while running, by hooks on the models. `grpo` and `trl` make the pass for old log-probabilities
although each makes one update here, as trainers do that always make it; the project's own GRPO leaves it out then.

TRL runs its own loop, `GRPOTrainer.train()`, with one method overridden: `_generate_single_turn`, which samples, returns
the given completions. `num_iterations=2` makes it compute old log-probabilities, and before every step its buffer is
cleared, so that every step is the first on its batch. It is optional: pip install --no-deps -r requirements/bench.txt

Every method has a process of its own, and they take turns (A B C A B C ...); the first turn warms up. Reported are medians
of the ratios within a turn, of wall clock and of processor time (which other work disturbs less), and of peak memory: the
resident size at its highest during the steps, over that after the imports, so weights, gradients and Adam's state count.
GRPO's losses must be TRL's, at every turn, after every update. Writes benchmarks/results/step.json, or --output.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common.machine import describe_machine
from torch import nn

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
PACKAGES = ("torch", "megatron-core", "transformers", "trl")
BETA, LEARNING_RATE = 0.04, 1e-4
LOSS_TOLERANCE = 1e-4  # relative; the two forwards differ by float32 rounding


@dataclass(frozen=True)
class Case:
    """Sizes of model and batch."""

    prompts: int = 2
    group_size: int = 8
    prompt_tokens: int = 16
    least_tokens: int = 16
    most_tokens: int = 64
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 32_000


@dataclass(frozen=True)
class Method:
    """Who makes the step, and with which passes."""

    trainer: str  # "ours" or "trl"
    algorithm: str
    old_pass: bool


METHODS = {
    "gtpo": Method("ours", "gtpo", False),
    "grpo_on_policy": Method("ours", "grpo", False),
    "grpo": Method("ours", "grpo", True),
    "trl_on_policy": Method("trl", "grpo", False),
    "trl": Method("trl", "grpo", True),
}


@dataclass(frozen=True)
class Group:
    """A prompt, its completions and their rewards."""

    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]


def make_groups(case: Case) -> list[Group]:
    """Groups whose completions share their first and last tokens, as real ones do; rewards of 0 and 1."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, case.vocabulary, (count,), generator=generator).tolist()

    groups = []
    for _ in range(case.prompts):
        first, last = ids(4), ids(2)
        lengths = torch.randint(
            case.least_tokens - 6, case.most_tokens - 5, (case.group_size,), generator=generator
        ).tolist()
        completions = [first + ids(length) + last for length in lengths]
        rewards = [float(i % 2) for i in range(case.group_size)]
        groups.append(Group(ids(case.prompt_tokens), completions, rewards))
    return groups


def make_checkpoints(case: Case, directory: Path) -> None:
    """`policy`, and a `reference` some way from it, so that the KL term is not 0."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=8 * case.hidden // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=max(1, case.hidden // 128),
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(case.vocabulary)}, unk_token="t2"))
    for name in ("policy", "reference"):
        model.save_pretrained(directory / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2"
        ).save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))


class Turns:
    """A worker's side of the conversation: waits for its turn, then times a step and counts its passes."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print goes to stderr
        self._imported = self._resident("VmRSS")
        self._units = 0
        self._started: tuple[float, float] | None = None

    def count(self, *models: nn.Module) -> None:
        """Count the forward passes of these models; one that is to be differentiated counts 3."""

        def add(*_: Any) -> None:
            self._units += 3 if torch.is_grad_enabled() else 1

        for model in models:
            model.register_forward_hook(add)

    def begin(self) -> None:
        """Wait for the turn. Before the first one, forget the peak that loading the model left."""
        if self._started is None:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", "utf-8")
        sys.stdin.readline()
        self._units = 0
        self._started = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        """Report the step."""
        now = time.perf_counter(), time.process_time()
        seconds, processor = (b - a for a, b in zip(self._started, now, strict=True))
        peak = (self._resident("VmHWM") - self._imported) / MIB
        reply = {"seconds": seconds, "processor": processor, "loss": loss, "units": self._units}
        print(json.dumps(reply | {"peak_mib": round(peak, 1)}), file=self._replies, flush=True)

    @staticmethod
    def _resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def work_ours(method: Method, groups: list[Group], directory: Path, turns: int) -> None:
    """Steps by `train_on`, the training loop's own."""
    import numpy as np

    from gtpo_megatron import train
    from gtpo_megatron.config import RunConfig
    from gtpo_megatron.policy import platform as device
    from gtpo_megatron.policy.model import build_policy, initialize_parallel
    from gtpo_megatron.policy.optimizer import build_optimizer
    from gtpo_megatron.policy.step import with_logprobs
    from gtpo_megatron.rollout.collect import analyse
    from gtpo_megatron.trajectories.record import Trajectory

    def sampled(group: int, index: int) -> Trajectory:
        tokens = np.array(groups[group].completions[index], np.int32)
        return Trajectory(
            step=0,
            group=group,
            index=index,
            prompt_id=str(group),
            prompt_ids=np.array(groups[group].prompt, np.int32),
            token_ids=tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            token_versions=np.zeros(len(tokens), np.int32),
            finish_reason="stop",
            reward=groups[group].rewards[index],
        )

    clock = Turns()
    batch = [sampled(g, i) for g, group in enumerate(groups) for i in range(len(group.completions))]
    grpo = method.algorithm == "grpo"
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"path": str(directory / "policy"), "dtype": "fp32"},
            "data": {"path": "none"},
            "algorithm": {"name": method.algorithm} | ({"kl_beta": BETA} if grpo else {}),
            "optimizer": {"lr": LEARNING_RATE},
            # the whole batch in one micro-batch, as TRL has it
            "training": {
                "steps": turns,
                "micro_batch_tokens": sum(len(t.prompt_ids) + t.length for t in batch),
            },
        }
    )
    device.init_process_group()
    initialize_parallel(config.parallel, config.training.seed)
    policy, reference = build_policy(config.model, config.parallel, config.training), None
    if grpo:
        frozen = config.model.model_copy(update={"path": str(directory / "reference")})
        reference = build_policy(frozen, config.parallel, config.training, trained=False)
    if method.old_pass:
        train.with_old_logprobs = lambda run, batches, temperature: with_logprobs(
            run.policy, batches, "old_logprobs", temperature=temperature
        )
    run = SimpleNamespace(
        config=config,
        policy=policy,
        reference=reference,
        optimizer=build_optimizer(config.optimizer, policy, turns),
        initial_entropy=None,
        version=0,
        stage=lambda name: nullcontext(),
    )
    clock.count(*policy.chunks, *(reference.chunks if reference else ()))
    for _ in range(turns):
        clock.begin()
        passed, _ = train.train_on(run, *train.dealt(run, analyse(batch, "std" if grpo else "mean")))
        clock.end(passed.loss)


def work_trl(method: Method, groups: list[Group], directory: Path, turns: int) -> None:
    """Steps by GRPOTrainer.train()."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Turns()
    size = len(groups[0].completions)
    model = AutoModelForCausalLM.from_pretrained(directory / "policy", dtype=torch.float32)
    model.config._name_or_path = str(directory / "reference")  # where it looks for the reference policy

    def picked(prompts: list[str]) -> Iterator[tuple[Group, int]]:
        """The group of each prompt, and which of its completions this repetition stands for."""
        seen = [0] * len(groups)
        for prompt in prompts:
            yield groups[int(prompt)], seen[int(prompt)]
            seen[int(prompt)] += 1

    class Trainer(GRPOTrainer):
        loss = 0.0

        def _generate_single_turn(self, prompts: list[str], images: Any) -> tuple[Any, ...]:
            pairs = list(picked(prompts))
            return [g.prompt for g, _ in pairs], [g.completions[i] for g, i in pairs], None, {}

        def compute_loss(self, *arguments: Any, **options: Any) -> torch.Tensor:
            result = super().compute_loss(*arguments, **options)
            self.loss = result.item()
            return result

    class Clocked(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer._step, trainer._buffered_inputs = 0, None
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(trainer.loss)

    def reward(prompts: list[str], **_: Any) -> list[float]:
        return [g.rewards[i] for g, i in picked(prompts)]

    trainer = Trainer(
        model,
        reward,
        GRPOConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=size * len(groups),
            steps_per_generation=1,
            num_generations=size,
            num_iterations=2 if method.old_pass else 1,
            max_steps=turns,
            beta=BETA,
            loss_type="grpo",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
        processing_class=AutoTokenizer.from_pretrained(directory / "policy"),
        callbacks=[Clocked()],
    )
    clock.count(trainer.model, trainer.ref_model)
    trainer.train()


@contextmanager
def worker(name: str, case: Case, directory: Path, turns: int) -> Iterator[Callable[[], dict[str, float]]]:
    """A process for a method; calling it takes a turn."""
    job = json.dumps([name, asdict(case), str(directory), turns])
    log = directory / f"{name}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, __file__, "--job", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):

        def turn() -> dict[str, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            reply = process.stdout.readline()
            if not reply:
                raise RuntimeError(f"{name} ended:\n{log.read_text()[-3000:]}")
            return json.loads(reply)

        try:
            yield turn
        finally:
            process.stdin.close()


def measure(case: Case, names: list[str], turns: int) -> dict[str, list[dict[str, float]]]:
    """What each method replied at each turn; the first is the warm-up."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make_checkpoints(case, Path(directory))
        workers = {
            name: stack.enter_context(worker(name, case, Path(directory), turns + 1)) for name in names
        }
        rounds = [{name: turn() for name, turn in workers.items()} for _ in range(turns + 1)]
    return {name: [entry[name] for entry in rounds] for name in names}


def summarise(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """GTPO's share of each method's time and memory, medians over turns."""
    steps = {name: replies[1:] for name, replies in found.items()}

    def share(name: str, key: str) -> float:
        pairs = zip(steps["gtpo"], steps[name], strict=True)
        return round(statistics.median(a[key] / b[key] for a, b in pairs), 3)

    return {
        name: {
            "units": replies[-1]["units"],
            "seconds": round(statistics.median(r["seconds"] for r in replies), 4),
            "processor_seconds": round(statistics.median(r["processor"] for r in replies), 4),
            "peak_mib": replies[-1]["peak_mib"],
            "gtpo_share_of_seconds": share(name, "seconds"),
            "gtpo_share_of_processor_seconds": share(name, "processor"),
            "gtpo_share_of_units": round(steps["gtpo"][-1]["units"] / replies[-1]["units"], 3),
            "gtpo_share_of_peak": round(steps["gtpo"][-1]["peak_mib"] / replies[-1]["peak_mib"], 3),
            "losses": [r["loss"] for r in found[name]],
        }
        for name, replies in steps.items()
    }


def loss_difference(found: dict[str, list[dict[str, float]]], ours: str, peer: str) -> float:
    """Largest relative difference of two methods' losses over the turns."""
    pairs = zip(found[ours], found[peer], strict=True)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


def installed_versions() -> dict[str, str]:
    """Of the packages compared."""
    installed = [name for name in PACKAGES if name != "trl" or importlib.util.find_spec("trl")]
    return {
        name: importlib.metadata.version(name) if name in installed else "not installed" for name in PACKAGES
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json")
    for field, default in asdict(Case()).items():
        parser.add_argument("--" + field.replace("_", "-"), type=int, default=default)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        name, sizes, directory, turns = json.loads(arguments.job)
        work = {"ours": work_ours, "trl": work_trl}[METHODS[name].trainer]
        return work(METHODS[name], make_groups(Case(**sizes)), Path(directory), turns)

    case = Case(**{field: getattr(arguments, field) for field in asdict(Case())})
    has_trl = importlib.util.find_spec("trl") is not None
    names = [name for name, method in METHODS.items() if has_trl or method.trainer != "trl"]
    found = measure(case, names, arguments.turns)
    lengths = [len(c) for group in make_groups(case) for c in group.completions]
    report: dict[str, Any] = {
        "machine": describe_machine() | installed_versions(),
        "case": asdict(case) | {"completion_tokens": sum(lengths), "longest": max(lengths)},
        "turns": arguments.turns,
        "methods": summarise(found),
    }
    for name, result in report["methods"].items():
        print(
            f"{name:15} {result['units']} units, {result['seconds']:7.3f} s, {result['peak_mib']:7.1f} MiB; gtpo takes "
            f"{result['gtpo_share_of_seconds']:.2f} of its time (processor {result['gtpo_share_of_processor_seconds']:.2f}, "
            f"units {result['gtpo_share_of_units']:.2f}), {result['gtpo_share_of_peak']:.2f} of its memory"
        )
    if has_trl:
        report["loss_difference"] = {
            f"{a} and {b}": loss_difference(found, a, b)
            for a, b in (("grpo", "trl"), ("grpo_on_policy", "trl_on_policy"))
        }
        print("losses differ by", report["loss_difference"])
        assert max(report["loss_difference"].values()) <= LOSS_TOLERANCE, (
            "the methods do not compute the same"
        )
    else:
        print("trl: not installed")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
