"""Which faults come when, as a value and as a file."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
import yaml

from octet.errors import ConfigError
from octet.faults import POINTS, Action
from ops.chaos.cable import Way

PoolName = Literal["prefill", "decode", "experts"]
Target = Literal["prefill", "decode", "experts", "router", "frontend", "controller"]
DURATION_S = 4.0
LONGEST_JUMP_S = 366 * 86400.0


class _Event(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    do: str
    at_s: float = pydantic.Field(ge=0)
    """After the beginning of the load."""

    @property
    def kind(self) -> str:
        """By which reports put events together."""
        return self.do.replace("_", " ")


class _Aimed(_Event):
    target: Target
    which: int = pydantic.Field(0, ge=0)
    """Of the target's members at that moment, in the order of their ids, and from the first again past the last."""

    @property
    def aim(self) -> str:
        return self.target


class Kill(_Aimed):
    """SIGKILL."""

    do: Literal["kill"] = "kill"
    all: bool = False
    """Every member of the pool at once."""

    @property
    def kind(self) -> str:
        return f"kill {'every ' * self.all}{self.target}"


class Stop(_Aimed):
    """SIGSTOP, and SIGCONT later: also to a process that was given up meanwhile, and was killed for it."""

    do: Literal["stop"] = "stop"
    for_s: float = pydantic.Field(gt=0)

    @property
    def kind(self) -> str:
        return f"stop {self.target}"


class Arm(_Aimed):
    """A fault at a named step; see `octet.faults`."""

    do: Literal["arm"] = "arm"
    point: str
    action: Action = "kill"
    after: int = pydantic.Field(0, ge=0)
    for_s: float = pydantic.Field(0.5, ge=0)
    """Of a delay or a stop."""

    @pydantic.model_validator(mode="after")
    def _the_step_is_reached_there(self) -> Arm:
        if self.point not in POINTS:
            raise ValueError(f"there is no step '{self.point}', only {', '.join(POINTS)}")
        if self.target not in POINTS[self.point]:
            raise ValueError(f"'{self.point}' is a step of {' and '.join(POINTS[self.point])}, not of {self.target}")
        return self

    @property
    def kind(self) -> str:
        return f"{self.action} {self.target} at {self.point}"


class Scale(_Event):
    """Another size of a pool, asked for as any operator would; it is brought back at the end."""

    do: Literal["scale"] = "scale"
    pool: PoolName
    by: int

    @property
    def kind(self) -> str:
        return f"scale {self.pool} by {self.by:+d}"


class Rebalance(_Event):
    """Experts move after their load."""

    do: Literal["rebalance"] = "rebalance"


class Cut(_Event):
    """Packets between two hosts vanish, and nobody is told. Takes `--hosts 2`."""

    do: Literal["cut"] = "cut"
    way: Way = "both"
    for_s: float | None = pydantic.Field(None, gt=0)
    """For good where it is not given."""

    @property
    def kind(self) -> str:
        return "cut" if self.way == "both" else f"cut {self.way}"


class Slow(_Event):
    """Packets between two hosts take their time, in either direction. Takes `--hosts 2`."""

    do: Literal["slow"] = "slow"
    delay_s: float = pydantic.Field(0.0, ge=0)
    mbit_per_s: float | None = pydantic.Field(None, gt=0)
    for_s: float = pydantic.Field(gt=0)

    @pydantic.model_validator(mode="after")
    def _it_is_slow_in_one_way(self) -> Slow:
        if bool(self.delay_s) == (self.mbit_per_s is not None):
            raise ValueError("one of delay_s and mbit_per_s")
        return self

    @property
    def kind(self) -> str:
        return f"delay {self.delay_s * 1e3:g} ms" if self.delay_s else f"throttle {self.mbit_per_s:g} Mbit/s"


class KillNode(_Event):
    """SIGKILL to the raylet of the other host: its members die with it. For good. Takes `--hosts 2`."""

    do: Literal["kill_node"] = "kill_node"


class LimitMemory(_Aimed):
    """The kernel kills a process for the memory that it takes."""

    do: Literal["limit_memory"] = "limit_memory"

    @property
    def kind(self) -> str:
        return f"limit memory of {self.target}"


class FillDisk(_Event):
    """Not a byte is free where Ray has its session and logs."""

    do: Literal["fill_disk"] = "fill_disk"
    for_s: float = pydantic.Field(gt=0)


class JumpClock(_Event):
    """The time of day jumps in the cluster's Python processes, from where it is; see `wall_clock.c`."""

    do: Literal["jump_clock"] = "jump_clock"
    by_s: float
    for_s: float | None = pydantic.Field(None, gt=0)
    """For good where it is not given."""

    @pydantic.field_validator("by_s")
    @classmethod
    def _it_jumps(cls, by_s: float) -> float:
        if not 0 < abs(by_s) <= LONGEST_JUMP_S:
            raise ValueError(f"by at most {LONGEST_JUMP_S:g} s, forward or back, and not by 0")
        return by_s

    @property
    def kind(self) -> str:
        return f"jump clock by {self.by_s:+g} s"


Event: TypeAlias = Annotated[
    Kill | Stop | Arm | Scale | Rebalance | Cut | Slow | KillNode | LimitMemory | FillDisk | JumpClock,
    pydantic.Field(discriminator="do"),
]


class Schedule(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: str = "schedule"
    duration_s: float = pydantic.Field(DURATION_S, gt=0)
    """Of the load, at least; it goes on until every fault is over."""
    events: tuple[Event, ...] = ()

    @pydantic.model_validator(mode="after")
    def _one_thing_at_a_time_happens_between_hosts(self) -> Schedule:
        _apart([event for event in self.events if isinstance(event, Cut | Slow | KillNode)])
        return self

    @pydantic.model_validator(mode="after")
    def _a_disk_is_full_once_at_a_time(self) -> Schedule:
        _apart([event for event in self.events if isinstance(event, FillDisk)])
        return self

    @pydantic.model_validator(mode="after")
    def _events_are_within_the_load(self) -> Schedule:
        late = [event for event in self.events if event.at_s > self.duration_s]
        if late:
            raise ValueError(f"{late[0].kind} comes at {late[0].at_s} s, after duration_s ({self.duration_s})")
        return self


def _apart(events: Sequence[Cut | Slow | KillNode | FillDisk]) -> None:
    """Raises: ValueError."""
    for earlier, later in itertools.pairwise(sorted(events, key=lambda event: event.at_s)):
        for_s = None if isinstance(earlier, KillNode) else earlier.for_s
        if for_s is None or later.at_s < earlier.at_s + for_s:
            raise ValueError(f"{later.kind} at {later.at_s} s begins before {earlier.kind} is over")


def load_schedule(file: pathlib.Path) -> Schedule:
    """From YAML or JSON. Raises: ConfigError naming the field."""
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(str(file), error.strerror, "a readable YAML or JSON file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"invalid YAML ({error})", "a YAML or JSON mapping") from error
    if not isinstance(tree, dict):
        raise ConfigError(str(file), type(tree).__name__, "a mapping with the field 'events'")
    return parse_schedule({"name": file.stem, **tree})


def parse_schedule(tree: dict[str, Any]) -> Schedule:
    """Raises: ConfigError naming the field."""
    try:
        return Schedule.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "schedule"
        raise ConfigError(field, repr(first["input"]) if first["loc"] else "a contradiction", first["msg"]) from error


def dump_schedule(schedule: Schedule) -> str:
    """As `load_schedule` reads it."""
    return json.dumps(schedule.model_dump(mode="json"), indent=2) + "\n"
