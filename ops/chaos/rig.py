"""What faults take beside the cluster: a cable between hosts, a small disk, a clock, a Ray that loses replies."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from octet.errors import ConfigError
from ops.chaos.cable import Cable
from ops.chaos.hosts import two_hosts
from ops.chaos.resources import may_limit_memory, small_disk, why_no_small_disk
from ops.chaos.schedule import Cut, Event, FillDisk, JumpClock, KillNode, LimitMemory, Schedule, Slow
from ops.chaos.wall_clock import WallClock, why_no_wall_clock

_DISK_MIB = 64
"""Ray's session and logs have room on it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    cable: Cable | None = None
    disk: pathlib.Path | None = None
    """With Ray's session and logs on it."""
    clock: WallClock | None = None
    overrides: tuple[str, ...] = ()
    """Of the cluster's configuration."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """To be there when its Ray starts."""

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Processes that are started meanwhile have `env`."""
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def check_events(schedules: Sequence[Schedule], *, own: bool, hosts: int) -> None:
    """
    Args:
        own: whether the cluster is the harness's own.
        hosts: on how many it is.

    Raises: ConfigError for an event that cannot be carried out here, with what it takes.
    """
    events = [event for schedule in schedules for event in schedule.events]
    for event in events:
        match event:
            case Cut() | Slow() | KillNode() if hosts < 2:
                raise _cannot(event, "a cluster on one host", "one on two", "Pass --hosts 2")
            case LimitMemory() if not may_limit_memory():
                found = "no control group of memory that may be written to (/sys/fs/cgroup/memory/cgroup.procs)"
                raise _cannot(event, found, "root, and control groups of version 1", "Leave the event out here")
            case FillDisk() | JumpClock() if not own:
                raise _cannot(event, "a cluster that runs already", "one of the harness's own", "Leave out --against")
            case FillDisk() if reason := why_no_small_disk():
                raise _cannot(event, reason, "a file system that can be filled", "Run as root")
            case JumpClock() if reason := why_no_wall_clock():
                raise _cannot(event, reason, "Linux and a C compiler", "Install gcc or clang")
    gone = next((number for number, event in enumerate(events) if isinstance(event, KillNode)), None)
    late = [event for event in events[(gone or 0) + 1 :] if isinstance(event, Cut | Slow | KillNode)]
    if gone is not None and late:
        raise _cannot(late[0], "no other host after 'kill_node'", "one that is there", "Put it into a run of its own")


def _cannot(event: Event, found: str, expected: str, fix: str) -> ConfigError:
    return ConfigError(f"events, {event.do} at {event.at_s:g} s", found, expected, fix)


@contextlib.contextmanager
def rigged(
    schedules: Sequence[Schedule], hosts: int = 1, failing: Mapping[str, Mapping[str, int]] | None = None
) -> Iterator[Rig]:
    """All that these schedules take, as long as the context is open.

    Args:
        failing: which of its own calls the cluster's Ray fails; see `ray_replies`.

    Raises: ConfigError, StartupError.
    """
    does = {event.do for schedule in schedules for event in schedule.events}
    env: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        disk = clock = None
        if "fill_disk" in does:
            disk = stack.enter_context(small_disk(_DISK_MIB))
            env["RAY_TMPDIR"] = str(disk)
        if "jump_clock" in does:
            clock = WallClock(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="octet-clock-"))))
            env |= clock.env
        if failing:
            env["RAY_testing_rpc_failure"] = json.dumps(failing)
        rig = Rig(disk=disk, clock=clock, env=env)
        if hosts > 1:
            with rig.starting():
                two = stack.enter_context(two_hosts(disk))
            rig = dataclasses.replace(rig, cable=two.cable, overrides=two.overrides)
        yield rig
