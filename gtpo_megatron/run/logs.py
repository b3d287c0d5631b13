"""What a run logs, and where: everything in a file of each rank, on the console what a person has to know."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "gtpo_megatron"
# Importing megatron.training (Megatron-Bridge 0.6 does) sends every record from INFO on to standard output.
TALKATIVE = ("megatron", PACKAGE)
# Warnings of libraries that no user of this program can act on: logger -> what the message says.
NOISE = {
    # Megatron-Bridge and older checkpoints name it so; transformers reads both
    "transformers.configuration_utils": "`torch_dtype` is deprecated",
    "transformers.modeling_utils": "`torch_dtype` is deprecated",
    # said for each model built where neither Transformer Engine nor apex is installed; the doctor tells it once
    "megatron.bridge.utils.fusions": "gradient_accumulation_fusion requires",
    # Megatron-Core 0.19 of the only model that its pipeline schedules and Megatron-Bridge know
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Megatron-Core 0.19: NVRx, its other way, is not installed
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # Megatron-Bridge 0.6 without Transformer Engine, with a traceback
    "megatron.bridge.utils.import_utils": "Import of FP8GlobalStateManager",
}


def quiet_libraries() -> None:
    """Keep libraries' NOISE, and their FutureWarnings about each other, out of the logs, and progress off the console."""
    for name, text in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(text))
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    for text in ("torch.distributed is disabled", "The argument order of load has been changed"):
        warnings.filterwarnings(
            "ignore", text, UserWarning
        )  # Megatron-Core's use of torch.distributed.checkpoint


class _Without(logging.Filter):
    """Lets pass what does not begin with the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._text)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send all log records from INFO on to a file of this rank; this package's warnings and all errors to the console too.

    Console handlers that a library has given to the root logger (Megatron-Bridge 0.6 does) are set aside meanwhile: they
    would print every record.
    """
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    console.addFilter(lambda record: record.levelno >= logging.ERROR or record.name.startswith(PACKAGE))
    root = logging.getLogger()
    set_aside = [handler for handler in root.handlers if _is_console(handler)]
    levels = {name: logging.getLogger(name).level for name in ("root", *TALKATIVE)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.INFO)
    for handler in set_aside:
        root.removeHandler(handler)
    for handler in (file, console):
        root.addHandler(handler)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in (file, console):
            root.removeHandler(handler)
        for handler in set_aside:
            root.addHandler(handler)
        file.close()


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
