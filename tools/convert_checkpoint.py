#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron; the same as `gtpo-megatron convert`. See --help."""

import sys

from gtpo_megatron.convert_cli import convert_app
from gtpo_megatron.errors import UserError

if __name__ == "__main__":
    try:
        convert_app()
    except UserError as error:
        sys.exit(f"error: {error}")
