"""`python -m gtpo_megatron` of a rank that, alive, never comes to its third update: the others wait for it in a collective."""

import sys
import time
from typing import Any

from gtpo_megatron import train
from gtpo_megatron.commands.cli import main

apply_update = train.apply_update
updates = 0


def stop_at_the_third(*arguments: Any) -> Any:
    global updates
    updates += 1
    if updates == 3:
        time.sleep(3600)
    return apply_update(*arguments)


train.apply_update = stop_at_the_third
main(sys.argv[3:])  # after -m gtpo_megatron
