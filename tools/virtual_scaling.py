"""A strong and a weak scaling study over 1, 2 and 4 nodes of a virtual cluster: whether the machinery works, not how fast.

    python tests/slurm/virtual.py .venv/bin/python tools/virtual_scaling.py --output OUT

All nodes share this machine's cores, one rank each, on gloo; the embedded engine samples from a random model. Jobs take turns
(singletons). `submit --scaling` queues them, `scaling-report` writes OUT/strong and OUT/weak.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PROGRAM = [sys.executable, "-m", "gtpo_megatron"]
NODES = (1, 2, 4)
LIMIT_S = 1800


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A recipe, and the site of the virtual cluster."""
    from tests.tiny_models import make_tiny_checkpoint

    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    model = make_tiny_checkpoint(folder / "model", "llama", **sizes)
    sums = "".join(f'{{"question": "{n} + {n}?", "answer": "{2 * n}"}}\n' for n in range(64))
    (folder / "sums.jsonl").write_text(sums)
    term = {"kind": "python", "name": "characters", "function": "tests.training_rewards:different_characters"}
    recipe = {
        "name": "study",
        "dir": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"path": str(folder / "sums.jsonl"), "system_prompt": "", "max_prompt_tokens": 120},
        "training": {"steps": 8, "micro_batch_tokens": 1024},
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 64},
        "rewards": {"workers": 1, "terms": [term]},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": "off"},
    }
    site = {
        "gpus_per_node": 0,
        "ranks_per_node": 1,
        "time": "00:30:00",
        "interface": "eth0",
        "sbatch": ["--job-name=study", "--dependency=singleton"],
        "env": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    for name, values in (("recipe", recipe), ("site", site)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml", folder / "site.yaml"


def wait_for(runs: list[Path]) -> None:
    """Until all runs are complete. Raises RuntimeError if one fails, or none has come to its end in time."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        files = [run / "status.json" for run in runs]
        states = [json.loads(file.read_text())["state"] if file.exists() else "queued" for file in files]
        if set(states) == {"complete"}:
            return
        if "failed" in states or time.monotonic() > deadline:
            raise RuntimeError(f"{dict(zip((run.name for run in runs), states, strict=True))}")
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        recipe, site = write_inputs(Path(folder))
        for kind, words in (("strong", []), ("weak", ["--weak"])):
            sizes = ",".join(map(str, NODES))
            submit = [*PROGRAM, "submit", str(recipe), "--site", str(site), "--scaling", sizes, *words]
            subprocess.run(submit, check=True, cwd=ROOT)
            runs = [Path(folder) / "runs" / f"study-{kind}-{nodes}" for nodes in NODES]
            wait_for(runs)
            report = [*PROGRAM, "scaling-report", *map(str, runs), "--output", str(output / kind)]
            subprocess.run(report, check=True, cwd=ROOT)
            found = subprocess.run([*report, "--json"], check=True, cwd=ROOT, capture_output=True, text=True)
            (output / kind / "scaling.json").write_text(found.stdout)


if __name__ == "__main__":
    main()
