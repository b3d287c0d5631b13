"""The limit of open files, which is that of requests in flight."""

import resource
import subprocess
import sys

import pytest

from gtpo_megatron.rollout.sglang.sockets import ENOUGH, RESERVED

TELL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from gtpo_megatron.rollout.sglang.sockets import allowed_sockets
print(allowed_sockets(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(1024, 4096, 4096 - RESERVED), (512, 1024, 512), (3000, 3000, 3000 - RESERVED)],
)
def test_the_limit_is_raised_as_far_as_the_process_may(soft: int, hard: int, expected: int) -> None:
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if resource.RLIM_INFINITY != highest < hard:
        pytest.fail(f"this machine allows {highest} open files; the test needs {hard}")
    command = [sys.executable, "-c", TELL, str(soft), str(hard)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [int(word) for word in answer] == [expected, min(hard, ENOUGH)]
