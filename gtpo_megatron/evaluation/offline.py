"""Evaluation outside of training: suites sampled part by part, each part written before the next, then the figures.

<output>/request.json                              what is evaluated; another request needs another output
<output>/<suite>/parts/step-*.parquet              finished parts, until the suite is whole
<output>/<suite>/trajectories/step-00000000.parquet  all samples, the record that training writes
<output>/evaluation.json, table.md, pass_at_k.png  the results
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gtpo_megatron.config import ParallelConfig, RunConfig
from gtpo_megatron.data.prompts import (
    Prompt,
    PromptSet,
    Question,
    load_prompts,
    load_questions,
    stop_token_ids,
)
from gtpo_megatron.data.suites import Suite, naming
from gtpo_megatron.errors import UserError
from gtpo_megatron.evaluation.engines import Part, Sampler, open_sampler
from gtpo_megatron.evaluation.estimates import check_ks, estimates, rows_of
from gtpo_megatron.evaluation.results import FORMAT, grader, write_results, write_text
from gtpo_megatron.evaluation.ticker import Note, Ticker
from gtpo_megatron.evaluation.training import sampling_params, sampling_seed
from gtpo_megatron.plan.checks import check_run
from gtpo_megatron.plan.conversion import check_source
from gtpo_megatron.policy import platform
from gtpo_megatron.policy.collective import on_rank_zero
from gtpo_megatron.rollout.protocol import SamplingParams
from gtpo_megatron.trajectories.record import Trajectory
from gtpo_megatron.trajectories.store import TrajectoryStore

SERVED_PART = 2048  # completions of a part where servers sample: few tails to wait for
EMBEDDED_BATCHES = 4  # of a part where the embedded engine does


@dataclass(frozen=True)
class Job:
    """A suite with its prompts and sampling."""

    suite: Suite
    prompts: tuple[Prompt, ...] | tuple[Question, ...]
    left_out: dict[str, int]
    params: SamplingParams
    seed: int
    ks: tuple[int, ...]
    part: int  # prompts sampled at once, and written

    @property
    def name(self) -> str:
        return self.suite.name

    def request(self) -> dict[str, Any]:
        """What fixes the samples of this suite. JSON-able."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            asked = prompt.prompt_ids if isinstance(prompt, Prompt) else prompt.turns
            digest.update(repr((prompt.id, asked, prompt.answer)).encode())
        sampling = asdict(self.params) | {
            "stop_token_ids": list(self.params.stop_token_ids),
            "seed": self.seed,
        }
        return {"prompts": digest.hexdigest()[:16], "sampling": sampling, "part": self.part}


def evaluate_suites(
    config: RunConfig,
    suites: Sequence[Suite],
    output: Path | None = None,
    note: Note = lambda line: None,
    every_s: float = 30.0,
) -> tuple[Path, dict[str, Any]]:
    """Sample the suites, score them, write all; goes on with what an earlier call of the same request left. Collective.

    `note` is told how far it is: after each part, and every `every_s` seconds of waiting for the engine or within a part.

    Returns the directory and the results, which are rank 0's alone in content.

    Raises:
        UserError: a setting that cannot work, another request's directory, or an engine that fails half-way; what was
            sampled until then is kept.
    """
    config = _without_trainer(config)
    suites = [replace(suite, config=_without_trainer(suite.config)) for suite in suites]
    for suite in suites:  # before anything that costs
        check_ks(suite.config.evaluation.k, suite.config.evaluation.samples)
    platform.init_process_group()
    ranks = dist.get_world_size()
    if ranks > 1 and engine_name(config) != "embedded":
        raise UserError("evaluate by servers or an endpoint runs in one process: start it without torchrun")
    policy = on_rank_zero(lambda: policy_identity(config))
    if policy["kind"] == "checkpoint":
        config = with_exported_policy(config, policy)
        suites = [replace(s, config=s.config.model_copy(update={"model": config.model})) for s in suites]
    tokenizer = None
    if policy["kind"] != "endpoint":
        for suite in suites:
            check_run(suite.config, ranks)
        tokenizer = AutoTokenizer.from_pretrained(config.model.tokenizer or config.model.path)
    jobs = [job_of(suite, tokenizer) for suite in suites]
    request = request_of(config, policy, jobs)
    directory = output or default_output(config, request)
    on_rank_zero(lambda: claim(directory, request))
    sample_all(config, tokenizer, jobs, directory, note, every_s)
    return directory, on_rank_zero(lambda: conclude(directory, request, policy, jobs))


def _without_trainer(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"rollout": config.rollout.alone})


def job_of(suite: Suite, tokenizer: PreTrainedTokenizerBase | None) -> Job:
    """The suite's prompts, as tokens, or as questions where there is no tokenizer because a server has it."""
    evaluation = suite.config.evaluation
    left_out: dict[str, int] = {}
    prompts: tuple[Prompt, ...] | tuple[Question, ...]
    with naming(suite.keys):
        if tokenizer is None:
            prompts = load_questions(suite.data)
        else:
            found: PromptSet = load_prompts(suite.data, tokenizer)
            prompts = found.prompts
            left_out = {"too_long": found.too_long, "malformed": found.skipped}
    if tokenizer is None or suite.config.rollout.engine != "embedded":
        part = SERVED_PART // evaluation.samples
    else:
        part = EMBEDDED_BATCHES * suite.config.rollout.batch_size // evaluation.samples
    return Job(
        suite,
        prompts,
        left_out,
        sampling_params(suite.config, stop_token_ids(tokenizer) if tokenizer else ()),
        sampling_seed(suite.config),
        check_ks(evaluation.k, evaluation.samples),
        max(part, 1),
    )


def policy_identity(config: RunConfig) -> dict[str, str]:
    """What is evaluated: its name, its kind, and a digest that changes with its files. Raises UserError if it is none."""
    endpoint = config.evaluation.endpoint
    if endpoint.url is not None:
        return {"kind": "endpoint", "name": f"{endpoint.model} at {endpoint.url}", "digest": endpoint.api}
    path = Path(config.model.path)
    if not path.is_dir():
        return {"kind": "hub", "name": config.model.path, "digest": ""}
    check_source(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    kind = "hf" if (path / "config.json").is_file() else "checkpoint"
    return {"kind": kind, "name": str(path.resolve()), "digest": digest.hexdigest()[:16]}


def with_exported_policy(config: RunConfig, policy: dict[str, str]) -> RunConfig:
    """The configuration with a training checkpoint's policy as a Hugging Face directory, exported once. Collective."""
    from gtpo_megatron.policy.exchange.convert import megatron_to_hf, start_ranks

    source = Path(policy["name"])
    target = config.path / "evaluations" / f"policy-{source.name}-{policy['digest'][:8]}"
    if not on_rank_zero(target.exists):
        start_ranks(ParallelConfig())
        megatron_to_hf(source, target, ParallelConfig(), config.model.dtype, logits=False)
    model = config.model.model_copy(update={"path": str(target), "tokenizer": config.model.tokenizer})
    return config.model_copy(update={"model": model})


def engine_name(config: RunConfig) -> str:
    """Who samples."""
    return "endpoint" if config.evaluation.endpoint.url is not None else config.rollout.engine


def request_of(config: RunConfig, policy: dict[str, str], jobs: Sequence[Job]) -> dict[str, Any]:
    """All that fixes the samples. JSON-able."""
    return {
        "policy": policy,
        "engine": engine_name(config),
        "dtype": None if policy["kind"] == "endpoint" else config.model.dtype,
        "suites": {job.name: job.request() for job in jobs},
    }


def default_output(config: RunConfig, request: dict[str, Any]) -> Path:
    """A directory of the run for this request alone."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return config.path / "evaluations" / f"{engine_name(config)}-{digest}"


def claim(directory: Path, request: dict[str, Any]) -> None:
    """Write request.json, or see that it is the same. Raises UserError if the directory holds another request."""
    file = directory / "request.json"
    if not file.exists():
        write_text(file, json.dumps(request, indent=1, sort_keys=True) + "\n")
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    if held != request:
        names = [key for key in request if held.get(key) != request[key]]
        raise UserError(
            f"{directory}: holds another evaluation (other {', '.join(names)}); give another --output, or remove it"
        )


def sample_all(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    jobs: Sequence[Job],
    directory: Path,
    note: Note,
    every_s: float,
) -> None:
    """Sample what is not there yet, and give each whole suite its file. Collective."""
    left = [job for job in jobs if not on_rank_zero(lambda job=job: whole(directory, job).steps())]
    if not left:
        return
    with ExitStack() as stack:
        ticker = stack.enter_context(Ticker(note, every_s))
        with ticker.on(lambda: f"starting the engine: {engine_name(config)}"):
            sampler = stack.enter_context(open_sampler(config, tokenizer, directory / "logs"))
        for job in left:
            sample_suite(job, sampler, directory, note, ticker)


def whole(directory: Path, job: Job) -> TrajectoryStore:
    """Where a suite's samples stand once they are whole."""
    return TrajectoryStore(directory / job.name / "trajectories")


def sample_suite(job: Job, sampler: Sampler, directory: Path, note: Note, ticker: Ticker) -> None:
    """Sample a suite part by part. Raises what ends the sampling, once what came before it is written. Collective."""
    parts = TrajectoryStore(directory / job.name / "parts")
    for number, start in enumerate(range(0, len(job.prompts), job.part)):
        there = on_rank_zero(lambda number=number: sorted({t.group for t in read_part(parts, number)[0]}))
        groups = range(start, min(start + job.part, len(job.prompts)))
        missing = [(group, job.prompts[group]) for group in groups if group not in set(there)]
        if not missing:
            continue
        done = [*range(start), *there]  # places; on several ranks those of others are added at the part's end
        with ticker.on(lambda done=done: f"{job.name}: {len(done)} of {len(job.prompts)} prompts"):
            sampled = sampler(Part(missing, job.params, job.seed, done.append))

        def keep(number: int = number, sampled: Any = sampled) -> None:
            before, lengths = read_part(parts, number)
            if sampled.trajectories:
                write_part(parts, number, [*before, *sampled.trajectories], lengths | sampled.lengths)

        on_rank_zero(keep)
        if sampled.error is not None:
            raise sampled.error
        note(f"{job.name}: {groups.stop} of {len(job.prompts)} prompts")

    def join() -> None:
        read = [read_part(parts, number) for number in parts.steps()]
        lengths = {key: value for _, part in read for key, value in part.items()}
        write_part(whole(directory, job), 0, [t for part, _ in read for t in part], lengths)
        shutil.rmtree(directory / job.name / "parts")

    on_rank_zero(join)


def read_part(store: TrajectoryStore, number: int) -> tuple[list[Trajectory], dict[tuple[int, int], int]]:
    """Trajectories of a part, and the lengths of those without tokens; none of a part that is not there."""
    if number not in store.steps():
        return [], {}
    lengths = store.read_notes(number).get("lengths", [])
    return store.read(number), {(group, index): tokens for group, index, tokens in lengths}


def write_part(
    store: TrajectoryStore,
    number: int,
    trajectories: Sequence[Trajectory],
    lengths: dict[tuple[int, int], int],
) -> None:
    """Write what `read_part` reads."""
    ordered = sorted(trajectories, key=lambda t: (t.group, t.index))
    store.write(number, ordered, {"lengths": [[*key, tokens] for key, tokens in sorted(lengths.items())]})


def conclude(
    directory: Path, request: dict[str, Any], policy: dict[str, str], jobs: Sequence[Job]
) -> dict[str, Any]:
    """Figures of the whole suites, written and returned."""
    results = {
        "format": FORMAT,
        "policy": policy,
        "engine": request["engine"],
        "grader": grader(),
        "suites": {job.name: suite_results(job, directory) for job in jobs},
    }
    write_results(directory, results)
    return results


def suite_results(job: Job, directory: Path) -> dict[str, Any]:
    """One suite's figures, and a row per prompt."""
    trajectories, lengths = read_part(whole(directory, job), 0)
    params = job.params

    def note(group: Sequence[Trajectory]) -> dict[str, str]:
        prompt = job.prompts[group[0].group]
        digest = hashlib.sha256(repr((prompt.question, prompt.answer)).encode()).hexdigest()[:16]
        return {"id": prompt.id, "digest": digest, "question": prompt.question[:200]}

    rows = rows_of(
        trajectories,
        job.ks,
        lengths,
        tokens_known=isinstance(job.prompts[0], Prompt),
        whole_distribution=params.temperature > 0 and params.top_p == 1.0 and not params.top_k,
        note=note,
    )
    return {
        "set": f"{job.suite.data.path} (split {job.suite.data.split})",
        "prompts": len(rows),
        "left_out": job.left_out,
        "samples": params.n,
        "scoring_failed": sum(t.reward_error is not None for t in trajectories),
        "sampling": job.request()["sampling"],
        "figures": {
            name: value.as_dict() for name, value in estimates([row["values"] for row in rows]).items()
        },
        "rows": rows,
    }
