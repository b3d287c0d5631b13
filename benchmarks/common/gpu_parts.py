"""The parts of benchmarks/gpu.py: each takes the setting, runs programs of this project, and gives what is worth keeping."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gtpo_megatron.machine.probe import FP8_CAPABILITY

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "gtpo_megatron")
# Qwen2.5-0.5B's shape, with a head width that every attention kernel takes
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 151_936,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TOY_MODEL = MODEL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
TOY_WORK = {"groups": 2, "group_size": 2, "completion": 32, "micro_batch_tokens": 256, "steps": 2}


class PartlyFailed(Exception):
    """Some of a part failed; what was measured is kept."""

    def __init__(self, result: dict[str, Any], said: str) -> None:
        super().__init__(said)
        self.result = result


class LeftOut(Exception):
    """A part that this machine has nothing for; the message says what is missing."""


@dataclass(frozen=True)
class Setting:
    """What the parts share."""

    folder: Path  # for what they write; removed at the end
    model: Path
    rehearsal: bool
    engine: bool  # whether Transformer Engine can be used here
    fp8: bool


def shell(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command of a part, run at the repository's root. Raises RuntimeError with the end of what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(map(str, command))}\n{end}")
    return done.stdout


def doctor(setting: Setting) -> dict[str, Any]:
    return {
        row["name"]: f"{row['status']}: {row['found']}"
        for row in json.loads(shell(*PROGRAM, "doctor", "--json"))
    }


def gpu_tests(setting: Setting) -> dict[str, Any]:
    report = setting.folder / "tests.xml"
    command = (sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}")
    failure = None
    try:
        shell(*command)
    except RuntimeError as error:
        failure = error
    if not report.is_file():
        raise failure or RuntimeError("pytest wrote no report")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    if failure or (counts["skipped"] and not setting.rehearsal):
        raise RuntimeError(f"{counts}\n{failure or 'tests were skipped'}")
    return counts


def head(setting: Setting) -> dict[str, Any]:
    output = setting.folder / "head.json"
    scope = ("--cases", "0", "--repeats", "1") if setting.rehearsal else ("--device", "cuda")
    shell(sys.executable, "benchmarks/head.py", *scope, "--output", output)
    return json.loads(output.read_text("utf-8"))


def quickstart(setting: Setting) -> dict[str, Any]:
    """Supervised warm-up and GTPO on addition, as `make quickstart` does, with the layers that `auto` takes."""
    folder = setting.folder / "quickstart"
    shell(sys.executable, "tools/make_quickstart.py", folder / "inputs")
    common = (f"dir={folder}", f"data.path={folder}/inputs/data", "logging.tensorboard=false")
    warm, steps = ("20", "2") if setting.rehearsal else ("400", "30")
    shell(
        *PROGRAM,
        "train",
        "recipes/quickstart-sft.yaml",
        *common,
        f"model.path={folder}/inputs/model",
        f"training.steps={warm}",
    )
    own = (
        f"model.path={folder}/quickstart-sft/hf",
        f"evaluation.data.path={folder}/inputs/data",
        f"training.steps={steps}",
        "optimizer.warmup_steps=1",
    )
    shell(*PROGRAM, "train", "recipes/quickstart.yaml", *common, *own)
    rows = metrics(folder / "quickstart")
    return {
        "steps": len(rows),
        "reward_first_5": mean(row["reward/mean"] for row in rows[:5]),
        "reward_last_5": mean(row["reward/mean"] for row in rows[-5:]),
        "seconds_per_step": mean(
            sum(v for k, v in row.items() if k.startswith("seconds/")) for row in rows[1:]
        ),
        "logprob_gap_mean": max(row["logprob_gap/mean"] for row in rows),
        "peak_gib": rows[-1]["memory/peak_gib"],
    }


def steps(setting: Setting) -> dict[str, Any]:
    """bf16 and each FP8 recipe on the same weights and completions."""
    from common.precision import BASELINE, VARIANTS, gap

    rows: dict[str, Any] = {}
    logprobs: dict[str, list[float]] = {}
    work = json.dumps(TOY_WORK if setting.rehearsal else {})
    for variant, section in VARIANTS.items():
        if reason := missing(section, setting):
            rows[variant] = {"left_out": reason}
            continue
        output = setting.folder / f"steps-{variant}.json"
        try:
            shell(
                sys.executable,
                "benchmarks/common/precision.py",
                variant,
                setting.model,
                output,
                "--work",
                work,
            )
        except RuntimeError as error:
            rows[variant] = {"failed": str(error)}
            continue
        row = json.loads(output.read_text("utf-8"))
        logprobs[variant] = row.pop("logprobs")
        rows[variant] = row | {"tokens": len(logprobs[variant])}
        if BASELINE in logprobs:
            rows[variant] |= {"logprob_gap": gap(logprobs[variant], logprobs[BASELINE])}
    if failed := [variant for variant, row in rows.items() if "failed" in row]:
        raise PartlyFailed(rows, f"{', '.join(failed)}: {rows[failed[0]]['failed']}")
    return rows


def missing(section: Mapping[str, Any], setting: Setting) -> str | None:
    """Why a `model` section cannot run here."""
    if section.get("layers") == "local":
        return None
    if not setting.engine:
        return "no usable Transformer Engine"
    return "this GPU has no FP8" if "fp8" in section and not setting.fp8 else None


def resume(setting: Setting) -> dict[str, Any]:
    """`verify-resume` in bf16 and in FP8: a run killed and started again against one left alone, bit for bit."""
    folder = setting.folder / "resume"
    shell(sys.executable, "tools/make_quickstart.py", folder / "inputs")
    found = {}
    for name, model in {"bf16": {"layers": "auto"}, "fp8": {"fp8": "hybrid"}}.items():
        if name == "fp8" and (reason := missing(model, setting)):
            found[name] = f"left out: {reason}"
            continue
        shell(
            *PROGRAM,
            "train",
            "recipes/quickstart.yaml",
            f"dir={folder}",
            f"name={name}",
            f"model.path={folder}/inputs/model",
            "model.dtype=bf16",
            *(f"model.{key}={value}" for key, value in model.items()),
            f"data.path={folder}/inputs/data",
            "evaluation.data=null",
            "training.steps=2",
            "optimizer.warmup_steps=1",
        )
        found[name] = shell(*PROGRAM, "verify-resume", folder / name).strip()
    return found


def weights(setting: Setting) -> dict[str, Any]:
    """Export under Hugging Face's names: exact, and how fast."""
    program = (sys.executable, "benchmarks/common/export.py", setting.model)
    return json.loads(shell(*program))


def transfer(setting: Setting) -> dict[str, Any]:
    """Two steps with completions from an SGLang server on a GPU of its own: certificate, seconds of the transfer by NCCL."""
    if (
        not setting.rehearsal
        and int(shell(sys.executable, "-c", "import torch; print(torch.cuda.device_count())")) < 2
    ):
        raise LeftOut("one GPU, and a server apart needs another (see together)")
    return _with_a_server(setting, "transfer")


def together(setting: Setting) -> dict[str, Any]:
    """The same with the server on the trainer's GPU, in turn: weights by CUDA IPC, seconds of the memory's changing hands."""
    settings = ("rollout.placement=together", "rollout.sglang.weight_transfer=tensor")
    return _with_a_server(setting, "together", *settings, "rollout.sglang.memory_share=0.5")


def _with_a_server(setting: Setting, name: str, *settings: str) -> dict[str, Any]:
    if not (ROOT / ".venv-sglang/bin/python").exists():
        raise LeftOut("no .venv-sglang here (make sglang)")
    folder = setting.folder / name
    shell(sys.executable, "tools/make_quickstart.py", folder / "inputs")
    shell(
        *PROGRAM,
        "train",
        "recipes/quickstart.yaml",
        f"dir={folder}",
        f"model.path={folder}/inputs/model",
        f"data.path={folder}/inputs/data",
        "evaluation.data=null",
        "rollout.engine=sglang",
        "training.steps=2",
        "optimizer.warmup_steps=1",
        *settings,
    )
    rows = metrics(folder / "quickstart")
    keys = ("seconds/turns", "seconds/weights", "seconds/rollout", "mismatch/mean_abs", "mismatch/max_abs")
    return {key: [row[key] for row in rows if key in row] for key in keys}


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of training steps, without evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def make_model(folder: Path, sizes: Mapping[str, Any]) -> Path:
    """A random model in bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def look() -> dict[str, Any]:
    """The first GPU's name and capability (None without one) and whether Transformer Engine is whole, asked in a process
    of its own: a parent that holds CUDA could not fork parts."""
    program = (
        "import json, torch; from gtpo_megatron.machine.probe import this_machine; machine = this_machine(); "
        "name = torch.cuda.get_device_name() if machine.cuda_capability else None; "
        "print(json.dumps({'device': name, 'capability': machine.cuda_capability, 'engine': machine.transformer_engine}))"
    )
    return json.loads(shell(sys.executable, "-c", program))


def setting_of(seen: Mapping[str, Any], folder: Path, model: Path | None, rehearsal: bool) -> Setting:
    """What `look` saw, and the model, made here if none is given."""
    capability = tuple(seen["capability"] or (0, 0))
    return Setting(
        folder=folder,
        model=model or make_model(folder / "model", TOY_MODEL if rehearsal else MODEL),
        rehearsal=rehearsal,
        engine=seen["engine"] and capability > (0, 0),
        fp8=capability >= FP8_CAPABILITY,
    )
