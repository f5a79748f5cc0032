"""Typed errors. Each names what was wrong, what was found, what was expected and what to do."""

from __future__ import annotations

from typing import Any

_MAX_SHOWN = 500


class OctetError(Exception):
    """The root of every error that Octet raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes with their fields, whatever their constructors take."""
        return _restore, (type(self), str(self), self.__dict__)


class ConfigError(OctetError):
    """A configuration value, a flag or a cluster file is wrong."""

    def __init__(self, field: str, found: object, expected: str, fix: str = "") -> None:
        self.field = field
        super().__init__(_sentence(f"config field '{field}'", found, expected, fix))


class CheckpointError(OctetError):
    """A model directory cannot be served; nothing has been started."""

    def __init__(self, file: str, subject: str, found: object, expected: str, fix: str = "") -> None:
        """
        Args:
            file: the file in the model directory.
            subject: the tensor or the field in that file.
        """
        self.file, self.subject = file, subject
        super().__init__(_sentence(f"{file}: '{subject}'" if subject else file, found, expected, fix))


class RequestError(OctetError):
    """A request is malformed: INVALID_ARGUMENT at the edge."""

    def __init__(self, field: str, found: object, expected: str, fix: str = "") -> None:
        self.field = field
        super().__init__(_sentence(f"field '{field}'", found, expected, fix))


class RequestExistsError(OctetError):
    """A request with this id and another body is live or kept: ALREADY_EXISTS at the edge."""


class RequestUnknownError(OctetError):
    """No request with this id is live or kept: NOT_FOUND at the edge."""


class RequestCancelledError(OctetError):
    """The request was given up because nobody read it: CANCELLED at the edge."""


class SlowReaderError(OctetError):
    """The client reads too slowly: RESOURCE_EXHAUSTED at the edge."""


class QueueFullError(OctetError):
    """The cluster has too much to do for this request: RESOURCE_EXHAUSTED at the edge."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        """
        Args:
            retry_after_s: when there may be room for it.
        """
        self.retry_after_s = retry_after_s
        super().__init__(f"{reason}; try again in {retry_after_s:.1f} s")


class UnavailableError(OctetError):
    """The cluster, or a part that the request needs, is not serving: UNAVAILABLE at the edge."""


class RequestFailedError(UnavailableError):
    """An accepted request cannot go on; asking for it again begins anew."""


class DeadlineExceededError(OctetError):
    """An accepted request did not end in time: DEADLINE_EXCEEDED at the edge."""


class WireError(OctetError):
    """Bytes from another process are not a message of ours."""


class LaneError(OctetError):
    """An exchange between an attention worker and its expert shards failed."""


class LaneTimeoutError(LaneError):
    """A peer of the lane stayed silent past its deadline."""


class PeerLostError(LaneError):
    """A peer of the lane closed its connection."""


class WrongEpochError(LaneError):
    """A frame carries another epoch than the lane it arrived on."""


class ExpertMissingError(LaneError):
    """A row asks for a slot that its shard does not hold. It is never answered with zeros."""


class RequestLimitError(LaneError):
    """A frame is larger than the lane's capacity."""


class TraceError(OctetError):
    """A file is no telemetry trace, or one that this version does not read."""

    def __init__(self, file: str, subject: str, found: object, expected: str, fix: str = "") -> None:
        """
        Args:
            subject: the line or the field in that file; may be empty.
        """
        self.file, self.subject = file, subject
        super().__init__(_sentence(f"{file}: {subject}" if subject else file, found, expected, fix))


class StartupError(OctetError):
    """A pool did not come up."""


class ChangeRefusedError(OctetError):
    """What was asked of the cluster cannot be done in the state that it is in, and is not: FAILED_PRECONDITION at the
    edge."""


def _restore(cls: type[OctetError], message: str, fields: dict[str, Any]) -> OctetError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


def _sentence(subject: str, found: object, expected: str, fix: str) -> str:
    text = f"{_shown(subject)}: found {_shown(found)}, expected {expected}"
    return text + (f"; {_shown(fix)}" if fix else "")


def _shown(value: object) -> str:
    """Text that any terminal, log and status takes, and no more of it than a status holds."""
    text = str(value).encode(errors="backslashreplace").decode()
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
