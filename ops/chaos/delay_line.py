"""A line that takes its time, in user space, for kernels without `netem`: two TUN devices, and a process between them.

`python -m ops.chaos.delay_line FIRST SECOND SECONDS` makes both devices where it runs, says "ready", and carries every
packet from one to the other after so many seconds, until it is killed; the devices go with it.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_MAX_BYTES = 65536
_MOST_PACKETS = 20_000
"""On their way in one direction; more are dropped, as by any line."""


def main(first: str, second: str, delay_s: float) -> None:
    ends = [_open(first), _open(second)]
    under_way: list[collections.deque[tuple[float, bytes]]] = [collections.deque(), collections.deque()]
    print("ready", flush=True)
    while True:
        due_s = min((line[0][0] for line in under_way if line), default=None)
        patience_s = None if due_s is None else max(0.0, due_s - time.monotonic())
        for end in select.select(ends, (), (), patience_s)[0]:
            line = under_way[ends.index(end)]
            while (packet := _read(end)) is not None:
                if len(line) < _MOST_PACKETS:
                    line.append((time.monotonic() + delay_s, packet))
        for end, line in zip(reversed(ends), under_way, strict=True):
            while line and line[0][0] <= time.monotonic():
                _write(end, line.popleft()[1])


def _open(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _read(end: int) -> bytes | None:
    try:
        return os.read(end, _MAX_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        # The device is not up yet, or not any more.
        time.sleep(0.001)
        return None


def _write(end: int, packet: bytes) -> None:
    try:
        os.write(end, packet)
    except OSError:
        # Nobody is there to take it: it is lost.
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
