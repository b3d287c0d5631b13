#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron; the same as `gtpo-megatron convert`. See --help."""

import os
import sys

from gtpo_megatron.commands.convert import convert_app
from gtpo_megatron.errors import UserError

if __name__ == "__main__":
    try:
        convert_app()
    except UserError as error:
        # every rank has the same error: one says it
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
