"""Machines, and the message that a user would read of a run that cannot be."""

import pytest

from gtpo_megatron.config import RunConfig
from gtpo_megatron.errors import UserError
from gtpo_megatron.plan.checks import Machine, check_run

CPU = Machine(cuda_capability=None, transformer_engine=False)
HOPPER = Machine(cuda_capability=(9, 0), transformer_engine=True)
AMPERE = Machine(cuda_capability=(8, 0), transformer_engine=True)


def problem(config: RunConfig, world_size: int = 1, machine: Machine = CPU) -> str:
    with pytest.raises(UserError) as caught:
        check_run(config, world_size, machine)
    return str(caught.value)
