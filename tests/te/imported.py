"""Imported once by the server from which the ranks with Transformer Engine's layers are forked."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from tests.te import standin

standin.install()

import tests.parallel.imported  # noqa: E402, F401
