"""How many requests may be in flight: each has a socket, and a process may have so many files open."""

import logging
import resource

log = logging.getLogger(__name__)
RESERVED = 1000  # for aborts, health, logs, ranks and whatever else the process opens
ENOUGH = 1 << 20


def allowed_sockets() -> int:
    """Raise this process's limit of open files as far as it may (often from 1,024). Returns how many sockets requests may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < highest:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
        except (OSError, ValueError) as error:  # above the system's own limit
            log.warning("the limit of open files stays at %d (ulimit -n): %s", soft, error)
    files = ENOUGH if soft == resource.RLIM_INFINITY else min(soft, ENOUGH)
    return max(files - RESERVED, files // 2)
