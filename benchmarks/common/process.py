"""What the kernel says of this process: its memory, and the bytes of its TCP connections."""

import ctypes
import os
import socket
import struct
from pathlib import Path

LIBC = ctypes.CDLL("libc.so.6")
# where tcpi_bytes_acked and tcpi_bytes_received stand in Linux's struct tcp_info
BYTES_ACKNOWLEDGED, BYTES_RECEIVED = 120, 128


def received_bytes() -> int:
    """Bytes that the kernel has received for this process's TCP connections, gloo's headers included."""
    return _of_connections(BYTES_RECEIVED)


def acknowledged_bytes() -> int:
    """Bytes that this process's TCP connections have sent and the others have acknowledged, gloo's headers included."""
    return _of_connections(BYTES_ACKNOWLEDGED)


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def forget_peak() -> None:
    """The peak resident set (VmHWM) is from now on what is resident; what malloc keeps to itself is given back before."""
    LIBC.malloc_trim(0)  # what an earlier step left must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")


def _of_connections(offset: int) -> int:
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:
            continue  # closed by now
        try:
            connection = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)  # a file
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                try:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                except OSError:
                    continue  # not of TCP
                total += struct.unpack_from("Q", info, offset)[0]
    return total
