"""`gtpo-megatron convert` and tools/convert_checkpoint.py: conversions between Hugging Face and Megatron checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gtpo_megatron.commands.imports import importing
from gtpo_megatron.config import ParallelConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.conversion import check_output, check_source

if TYPE_CHECKING:
    from gtpo_megatron.policy.exchange.proof import Proof

convert_app = typer.Typer(
    name="convert",
    help="Convert checkpoints between Hugging Face and Megatron, and prove it: every tensor matched by name, shape and "
    "bits, and the logits of both models on fixed prompts. A conversion whose proof fails leaves nothing behind.\n\n"
    "Run it plainly, or under torchrun with as many processes as tensor x pipeline for a model that is too big for one.",
    epilog="Examples:\n\n"
    "gtpo-megatron convert hf-to-megatron models/SmolLM2-135M-Instruct converted\n\n"
    "gtpo-megatron convert megatron-to-hf runs/gsm8k/checkpoints/latest exported --dtype bf16\n\n"
    "torchrun --nproc-per-node 4 tools/convert_checkpoint.py megatron-to-hf runs/gsm8k/checkpoints/latest exported "
    "--tensor 4\n\n"
    "gtpo-megatron convert --verify-only exported converted",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Dtype(StrEnum):
    """Stored type of the weights."""

    bf16 = "bf16"
    fp32 = "fp32"


Source = Annotated[Path, typer.Argument(help="Checkpoint to read", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Directory to write; it must not exist", show_default=False)]
Tensor = Annotated[int, typer.Option(help="Tensor parallelism of the converting processes", min=1)]
Pipeline = Annotated[int, typer.Option(help="Pipeline parallelism of the converting processes", min=1)]
Expert = Annotated[int, typer.Option(help="Expert parallelism of the converting processes", min=1)]
Logits = Annotated[
    bool, typer.Option(help="Compare the logits of both models (needs each whole on the first process)")
]


@convert_app.callback(invoke_without_command=True)
def convert(
    context: typer.Context,
    verify_only: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Prove two existing checkpoints, of either kind, to be the same model", metavar="A B"
        ),
    ] = None,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    logits: Logits = True,
) -> None:
    """Convert checkpoints, or prove two of them equal."""
    if context.invoked_subcommand:
        return
    if verify_only is None:
        typer.echo(context.get_help())
        raise typer.Exit(0)
    for checkpoint in verify_only:
        check_source(checkpoint)
    with importing():
        from gtpo_megatron.policy.exchange import convert as conversion

    parallel = _start(tensor, pipeline, expert)
    proof = conversion.verify_only(*verify_only, parallel, logits=logits)
    _report(proof, None)
    if not proof.holds:
        raise UserError(f"{verify_only[0]} and {verify_only[1]} are not the same model")


@convert_app.command("hf-to-megatron")
def hf_to_megatron(
    source: Source,
    output: Output,
    dtype: Annotated[Dtype, typer.Option(help="Stored type of the weights")] = Dtype.bf16,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    logits: Logits = True,
) -> None:
    """Write a Hugging Face directory as a Megatron checkpoint (megatron.core.dist_checkpointing)."""
    check_source(source, "hf")
    check_output(output)
    with importing():
        from gtpo_megatron.policy.exchange import convert as conversion

    parallel = _start(tensor, pipeline, expert)
    _report(conversion.hf_to_megatron(source, output, parallel, dtype.value, logits=logits), output)


@convert_app.command("megatron-to-hf")
def megatron_to_hf(
    source: Source,
    output: Output,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Stored type of the weights; default: as in the source")
    ] = None,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    logits: Logits = True,
    shard_mib: Annotated[int, typer.Option(help="Size of a safetensors file, MiB", min=1)] = 2048,
) -> None:
    """Write a Megatron checkpoint, of a training run or of a conversion, as a Hugging Face directory."""
    check_source(source, "megatron")
    check_output(output)
    with importing():
        from gtpo_megatron.policy.exchange import convert as conversion

    parallel = _start(tensor, pipeline, expert)
    proof = conversion.megatron_to_hf(
        source, output, parallel, dtype.value if dtype else None, logits=logits, shard_bytes=shard_mib << 20
    )
    _report(proof, output)


@convert_app.command("reshard")
def reshard(
    source: Source,
    output: Output,
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    expert: Expert = 1,
    logits: Logits = True,
) -> None:
    """Rewrite a Megatron checkpoint as another layout would write it, optimizer included.

    Training does not need it: a checkpoint holds whole tensors in pieces, and any parallel.* reads it as it is.
    """
    check_source(source, "megatron")
    check_output(output)
    with importing():
        from gtpo_megatron.policy.exchange import convert as conversion

    parallel = _start(tensor, pipeline, expert)
    _report(conversion.reshard(source, output, parallel, logits=logits), output)


def _start(tensor: int, pipeline: int, expert: int) -> ParallelConfig:
    from gtpo_megatron.policy.exchange.convert import start_ranks

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    start_ranks(parallel)
    return parallel


def _report(proof: "Proof", output: Path | None) -> None:
    from gtpo_megatron.policy.model import world_rank

    if world_rank():
        return
    typer.echo(f"source       {proof.source}\nresult       {proof.result}\n{proof.summary()}")
    if output is not None:
        import json

        measured = json.loads((output / "conversion.json").read_text(encoding="utf-8"))
        typer.echo(
            f"seconds      {measured['seconds_write']} to write, {measured['seconds_proof']} to prove\n"
            f"peak memory  {measured['peak_memory_gib_of_a_rank']} GiB (largest of {measured['ranks']} processes)\n"
            f"record       {output / 'conversion.json'}"
        )
