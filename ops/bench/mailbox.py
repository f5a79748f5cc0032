"""What it costs a token's event to come over an authenticated, encrypted mailbox socket: `python -m ops.bench.mailbox`.

Both ends live in one process, a thread each, and the two kinds of socket take turns. CPU time is the whole process's.
"""

from __future__ import annotations

import statistics
import threading
import time

import zmq

from octet.doorkeeper import Doorkeeper, Keys
from octet.ids import Epoch, RequestId, WorkerId
from octet.messages import StepReport, TokenEvent, WorkerLoad, decode, encode
from octet.secret import ClusterSecret

_EVENTS, _ROUNDS, _REPEATS = 8, 500, 5
"""Events in a report, as of a step of so many sequences; reports there and back in a row; rows."""
_WAIT_MS = 30_000


def main() -> None:
    """Print the one-way time and the CPU time of a report, by kind of socket: of the median of each row, and of each
    row's mean, the least."""
    for name, keys in (("plain", None), ("CURVE", Keys(ClusterSecret.draw()))) * 2:
        one_way_us, cpu_us = _measured(keys)
        print(
            f"{name}: one way {one_way_us:.1f} us (median of the fastest of {_REPEATS} rows), CPU {cpu_us:.1f} us "
            f"(mean of the least) a report of {_EVENTS} events"
        )


def _measured(keys: Keys | None) -> tuple[float, float]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    doorkeeper: Doorkeeper | None = None
    sockets, ends = [], []
    for _ in range(2):
        inbound = context.socket(zmq.PULL)
        if keys is not None:
            keys.guard(inbound)
            doorkeeper = doorkeeper or Doorkeeper(context, keys, inbound)
        port = inbound.bind_to_random_port("tcp://127.0.0.1")
        outbound = context.socket(zmq.PUSH)
        if keys is not None:
            keys.show(outbound)
        outbound.connect(f"tcp://127.0.0.1:{port}")
        for socket in (inbound, outbound):
            socket.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
            socket.setsockopt(zmq.LINGER, 0)
            sockets.append(socket)
        ends.append((inbound, outbound))
    (first_in, to_first), (second_in, to_second) = ends
    rounds = _ROUNDS * (_REPEATS + 1)

    def echo() -> None:
        for _ in range(rounds):
            to_first.send(encode(decode(second_in.recv())))

    answering = threading.Thread(target=echo, daemon=True)
    answering.start()
    report, times_us, cpus_us = _report(), [], []
    for repeat in range(_REPEATS + 1):
        cpu_s = time.process_time()
        row_us = []
        for _ in range(_ROUNDS):
            start_s = time.perf_counter()
            to_second.send(encode(report))
            decode(first_in.recv())
            row_us.append((time.perf_counter() - start_s) / 2 * 1e6)
        if repeat:  # The first makes the connections.
            times_us.append(statistics.median(row_us))
            cpus_us.append((time.process_time() - cpu_s) / (2 * _ROUNDS) * 1e6)
    answering.join()
    if doorkeeper is not None:
        doorkeeper.close()
    for socket in sockets:
        socket.close()
    context.term()
    return min(times_us), min(cpus_us)


def _report() -> StepReport:
    event = TokenEvent(
        request_id=RequestId("0123456789abcdef"), choice=0, attempt=1, index=100, token_id=31337, finish_reason=None
    )
    load = WorkerLoad(kv_pages_total=1000, kv_pages_free=500, running=8, waiting=0, tokens=100_000)
    return StepReport(worker_id=WorkerId("decode-0"), epoch=Epoch(1), events=(event,) * _EVENTS, load=load)


if __name__ == "__main__":
    main()
