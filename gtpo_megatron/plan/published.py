"""Predictions beside published figures: each row of a CSV file of training runs, GRPO steps and serving points."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.facts import GPU, Efficiency, Model, efficiency, find_gpu, find_model
from gtpo_megatron.plan.memory import sharded_training_peak
from gtpo_megatron.plan.sampling import (
    MOST,
    Server,
    batch_seconds,
    served_tokens_per_second,
    spread_lengths,
)
from gtpo_megatron.plan.time import UNCERTAINTY, step_time, transfer_seconds
from gtpo_megatron.plan.work import Layout, Precision, Work

COLUMNS = (
    "id,kind,model,gpus,system,TP,PP,CP,VP,EP,DP,FSDP,seq_len,MBS,GBS,precision,result,unit,extra,source"
)
PROMPT = 150  # tokens of a GRPO prompt: the tables say nothing of it, and mathematics problems are short
GIB = 2**30


@dataclass(frozen=True)
class Comparison:
    """A published figure and the plan's; `error` is predicted / published - 1, `reason` why there is none."""

    id: str
    kind: str
    predicted: float | None
    published: float | None
    error: float | None
    unit: str
    uncertainty: float | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


Predictor = Callable[[Mapping[str, str]], tuple[float, float]]  # row -> (figure, relative uncertainty)


class _Unmodelled(Exception):
    """Why a row has no prediction."""


def compare(path: Path) -> list[Comparison]:
    """Every row of the file, and its peak memory where that is published, in the file's order.

    Raises:
        UserError: the file cannot be read, or lacks columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot read it as CSV: {error}") from error
    missing = [name for name in COLUMNS.split(",") if name not in columns]
    if missing:
        raise UserError(f"{path}:1: columns are missing: {', '.join(missing)}; expected: {COLUMNS}")
    return [comparison for row in rows for comparison in compare_row(row)]


def compare_row(row: Mapping[str, str]) -> Iterator[Comparison]:
    """One row: what it measured, and peak memory if its remarks have that."""
    row = {key: value or "" for key, value in row.items() if key}
    yield _comparison(row, row["kind"], row["result"], row["unit"], _predict)
    if peak := re.search(r"peak memory ([\d.]+) GiB", row["extra"]):
        yield _comparison(row, "peak memory", peak[1], "GiB", _predict_memory)


def _comparison(
    row: Mapping[str, str], kind: str, published: str, unit: str, predict: Predictor
) -> Comparison:
    try:
        value = float(published)
        if not 0 < value < inf:
            raise ValueError
    except ValueError:
        return Comparison(
            row["id"], kind, None, None, None, unit, reason=f"result: {published!r} is no figure"
        )
    try:
        predicted, uncertainty = predict(row)
    except (_Unmodelled, UserError) as error:
        return Comparison(row["id"], kind, None, value, None, unit, reason=str(error))
    return Comparison(row["id"], kind, predicted, value, predicted / value - 1, unit, uncertainty)


def _predict(row: Mapping[str, str]) -> tuple[float, float]:
    if "tokens/s/GPU" not in row["unit"]:
        raise _Unmodelled(f"unit: {row['unit']!r} is not modelled; tokens/s/GPU is")
    kind = row["kind"].lower()
    if "serving" in kind:
        return _serving(row)
    if "grpo" in kind or "rl" in kind.split():
        return _rl_step(row)
    if "train" in kind or "tuning" in kind or "sft" in kind or "lora" in kind:
        return _training(row)
    raise _Unmodelled(f"kind: {row['kind']!r} is not modelled")


def _training(row: Mapping[str, str]) -> tuple[float, float]:
    model, gpu, layout, work, reached = _run(row)
    seconds = step_time(model, gpu, layout, work, reached).total
    tokens = work.micro_batches * work.rows * work.row * layout.data
    return tokens / seconds / layout.gpus, UNCERTAINTY["mixture" if model.experts else "dense"]


def _run(row: Mapping[str, str]) -> tuple[Model, GPU, Layout, Work, Efficiency]:
    model, gpu = find_model(row["model"]), find_gpu(row["system"])
    layout = _layout(row, model)
    rows = _whole(row, "MBS")
    micro_batches = _whole(row, "GBS") / (rows * layout.data)
    if micro_batches < 1:
        raise _Unmodelled(f"GBS: {row['GBS']} is less than a micro-batch on each of {layout.data} replicas")
    remarks = row["extra"].lower()
    titan = "torchtitan" in row["source"]
    recompute = "full" if "full ac" in remarks else "matmuls" if "selective ac" in remarks else "none"
    work = Work(
        row=_whole(row, "seq_len"),
        rows=rows,
        micro_batches=micro_batches,
        precision=_precision(row, gpu),
        recompute=recompute,
        eager=titan and "no compile" in remarks,
        torch_attention=titan,
        frozen="lora" in f"{row['kind']} {row['id']} {remarks}".lower(),
    )
    reached = efficiency()
    if titan and "async" not in remarks:  # plain tensor parallelism: nothing hides its communication
        reached = replace(reached, exposed_tensor=1.0)
    return model, gpu, layout, work, reached


def _predict_memory(row: Mapping[str, str]) -> tuple[float, float]:
    model, _, layout, work, _ = _run(row)
    if "torchtitan" not in row["source"] or layout.pipeline > 1 or model.experts:
        raise _Unmodelled(
            "peak memory is modelled for torchtitan's FSDP of dense models without pipeline, and for this program"
        )
    return sharded_training_peak(model, layout, work) / GIB, UNCERTAINTY["memory"]


def _rl_step(row: Mapping[str, str]) -> tuple[float, float]:
    """Sampling, two passes of scoring (old and reference logprobs), training, weight transfer; ahead by one: the slower of two."""
    model, gpu, reached = find_model(row["model"]), find_gpu(row["system"]), efficiency()
    layout = _layout(row, model)
    remarks = row["extra"]
    rollouts = _positive(_found(r"(\d+) rollouts/step", remarks, "rollouts/step"), "rollouts/step")
    mean = float(_found(r"mean total length (\d+(?:\.\d+)?)", remarks, "mean total length"))
    ahead = "1-step off" in remarks
    trainers = layout.gpus // 2 if ahead else layout.gpus
    served = re.search(r"TP,PP=(\d+),(\d+)", remarks)
    precision = _precision(row, gpu)
    size = _positive(served[1], "TP") * _positive(served[2], "PP") if served else layout.tensor
    server = Server(model, gpu, size, weight_bytes=1 if precision == "fp8" else 2)
    longest = _whole(row, "seq_len") - PROMPT
    if not PROMPT < mean < _whole(row, "seq_len"):
        raise _Unmodelled(f"mean total length: {mean} leaves no completion beside a prompt of {PROMPT}")
    servers = max(1, (layout.gpus - trainers if ahead else layout.gpus) // server.tensor)
    lengths = spread_lengths(mean - PROMPT, longest, min(rollouts, MOST))
    each = -(-rollouts // servers)
    sampling = batch_seconds(server, PROMPT, lengths, each, each, reached)

    spread = Layout(trainers, layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.expert)
    if not spread.data:
        raise _Unmodelled(f"{trainers} GPUs for training hold no replica of TP x PP x CP")
    row_tokens = _whole(row, "seq_len")
    rows = max(1.0, rollouts * mean / spread.data / row_tokens / reached.rl_fill)
    work = Work(int(mean), row_tokens / int(mean), rows, precision, recompute="full")
    training = step_time(model, gpu, spread, work, reached).total
    scoring = 2 * step_time(model, gpu, spread, _scored(work), reached).total
    refit = transfer_seconds(model, gpu, reached, senders=spread.pipeline)
    trained = training + scoring
    step = (max(trained, sampling) if ahead else trained + sampling) + refit + reached.step_overhead_s
    return rollouts * mean / step / layout.gpus, UNCERTAINTY["rl"]


def _scored(work: Work) -> Work:
    return replace(work, recompute="none", forward_only=True)


def _serving(row: Mapping[str, str]) -> tuple[float, float]:
    model, gpu = find_model(row["model"]), find_gpu(row["system"])
    prompt = _positive(_found(r"isl (\d+)", row["seq_len"], "seq_len: isl"), "seq_len: isl")
    completion = _positive(_found(r"osl (\d+)", row["seq_len"], "seq_len: osl"), "seq_len: osl")
    concurrency = _positive(_found(r"(\d+)", row["GBS"], "GBS: concurrency"), "GBS: concurrency")
    weight_bytes = 1 if _precision(row, gpu) == "fp8" else 2
    server = Server(model, gpu, _whole(row, "TP"), weight_bytes)
    if server.cached_tokens < prompt + completion:
        raise _Unmodelled(f"the weights leave no room for one request on {server.tensor} {gpu.name}")
    rate = served_tokens_per_second(server, prompt, completion, concurrency, efficiency())
    return rate / server.tensor, UNCERTAINTY["serving"]


def _layout(row: Mapping[str, str], model: Model) -> Layout:
    layout = Layout(
        gpus=_whole(row, "gpus"),
        tensor=_whole(row, "TP", 1),
        pipeline=_whole(row, "PP", 1),
        virtual=_whole(row, "VP", 1),
        context=_whole(row, "CP", 1),
        expert=_whole(row, "EP", 1) if model.experts else 1,
        sharded=_whole(row, "FSDP", 0) > 1,
        once_per_node=True,
    )
    replica = layout.tensor * layout.pipeline * layout.context
    if layout.gpus % replica:
        raise _Unmodelled(f"gpus: {layout.gpus} is not a multiple of TP x PP x CP = {replica}")
    if model.experts % layout.expert:
        raise _Unmodelled(f"EP: {model.experts} experts do not spread over {layout.expert} ranks")
    if layout.gpus % (layout.pipeline * layout.expert):
        raise _Unmodelled(
            f"gpus: {layout.gpus} is not a multiple of PP x EP = {layout.pipeline * layout.expert}"
        )
    return layout


def _precision(row: Mapping[str, str], gpu: GPU) -> Precision:
    text = row["precision"].upper()
    if text.startswith("BF16"):
        return "bf16"
    if not text.startswith(("FP8", "MXFP8")):
        raise _Unmodelled(f"precision: {row['precision']!r} is not modelled; BF16 and FP8 are")
    if gpu.fp8 is None:
        raise _Unmodelled(f"precision: {gpu.name} has no FP8")
    return "fp8"


def _whole(row: Mapping[str, str], column: str, default: int | None = None) -> int:
    """A number that may have a remark behind it; the default for an empty cell or n/a."""
    text = row[column].strip()
    if text.lower() in ("", "n/a", "na", "-", "none") and default is not None:
        return default
    number = re.match(r"-?\d+(?![.\d])", text)
    if number is None or not (1 if default is None else default) <= int(number[0]) < 10**9:
        raise _Unmodelled(f"{column}: {text!r} is no number of the kind")
    return int(number[0])


def _positive(text: str, what: str) -> int:
    if not 0 < int(text) < 10**9:
        raise _Unmodelled(f"{what}: {text} is no number of the kind")
    return int(text)


def _found(pattern: str, text: str, what: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise _Unmodelled(f"{what} is not given")
    return match[1]
