from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from octet.resumption import CallError, Resumption, typed
from octet.v1 import octet_pb2 as pb

PATIENT_S = 60.0
ACCEPTED = (("octet-request-id", "r"),)


@dataclasses.dataclass(frozen=True)
class Error:
    """As grpc raises it."""

    status: grpc.StatusCode
    metadata: tuple[tuple[str, Any], ...] = ()
    message: str = ""

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.message

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self.metadata


LOST = Error(grpc.StatusCode.UNAVAILABLE)
REFUSED = Error(grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", "1500"),))


def final_failure() -> Error:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="REQUEST_FAILED", domain="octet"))
    status = rpc_status.to_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, message="broken", details=[detail]))
    return Error(grpc.StatusCode.UNAVAILABLE, status.trailing_metadata, "broken")


def asked(*, accepted: bool = True, resume: bool = True, timeout_s: float = PATIENT_S, **fields: Any) -> Resumption:
    asked = Resumption(pb.GenerateRequest(**fields), timeout_s, resume=resume)
    if accepted:
        asked.note_metadata(ACCEPTED)
    return asked


def chunk(index: int, offset: int, *token_ids: int, finish: Any = 0, usage: bool = False) -> pb.GenerateChunk:
    chunk = pb.GenerateChunk(index=index, offset=offset, token_ids=token_ids, finish_reason=finish)
    if usage:
        chunk.usage.SetInParent()
    return chunk


def received(asked: Resumption) -> list[list[int]]:
    return [list(token_ids.ids) for token_ids in asked.next_request().received]


def test_a_request_has_an_id_and_a_seed_of_its_own() -> None:
    first, second = asked().next_request(), asked().next_request()
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed
    assert first.resumable


def test_what_the_caller_gave_stays() -> None:
    request = asked(request_id="mine", sampling=pb.Sampling(seed=0)).next_request()
    assert (request.request_id, request.sampling.seed) == ("mine", 0)


def test_a_request_that_shall_not_be_resumed_is_left_as_it_is() -> None:
    assert asked(resume=False).next_request() == pb.GenerateRequest()


def test_every_call_names_the_tokens_that_have_come() -> None:
    resumption = asked()
    for each in (chunk(1, 0, 20), chunk(0, 0, 10, 11), chunk(1, 1, 21)):
        assert resumption.take(each)
    assert received(resumption) == [[10, 11], [20, 21]]


@pytest.mark.parametrize("offset", [0, 2])
def test_a_gap_or_a_repeat_is_never_passed_on(offset: int) -> None:
    resumption = asked()
    resumption.take(chunk(0, 0, 10))
    with pytest.raises(CallError, match=r"DATA_LOSS.*token"):
        resumption.take(chunk(0, offset, 11))


def test_an_end_that_is_told_again_is_no_news() -> None:
    resumption = asked()
    assert resumption.take(chunk(0, 0, 10, finish=pb.STOP))
    assert not resumption.take(chunk(0, 1, finish=pb.STOP))


def test_usage_that_comes_with_an_end_told_again_is_passed_on_without_it() -> None:
    resumption = asked()
    resumption.take(chunk(0, 0, 10, finish=pb.STOP))
    again = chunk(0, 1, finish=pb.STOP, usage=True)
    assert resumption.take(again)
    assert (again.finish_reason, again.HasField("usage")) == (pb.FINISH_REASON_UNSPECIFIED, True)


def test_after_a_lost_connection_a_call_is_made_soon_and_then_less_and_less_often() -> None:
    resumption = asked()
    delays = [resumption.delay_s(LOST) or 0.0 for _ in range(12)]
    assert 0 < delays[0] <= 0.05
    assert 1.0 <= delays[-1] <= 2.0


def test_once_accepted_again_the_next_loss_is_taken_as_the_first() -> None:
    resumption = asked()
    for _ in range(12):
        resumption.delay_s(LOST)
    resumption.note_metadata(ACCEPTED)
    assert (resumption.delay_s(LOST) or 9.0) <= 0.05


@pytest.mark.parametrize(
    ("resumption", "error"),
    [
        (asked(accepted=False), LOST),
        (asked(resume=False), LOST),
        (asked(timeout_s=0.01), LOST),
        (asked(), final_failure()),
        (asked(), Error(grpc.StatusCode.DEADLINE_EXCEEDED)),
        (asked(), Error(grpc.StatusCode.RESOURCE_EXHAUSTED)),
        (asked(accepted=False), REFUSED),
    ],
    ids=["never accepted", "not to be resumed", "no time left", "failed for good", "deadline", "too slow", "refused"],
)
def test_other_errors_are_the_last(resumption: Resumption, error: Error) -> None:
    assert resumption.delay_s(error) is None


def test_a_server_that_has_no_room_for_a_resumed_request_is_asked_again_when_it_says() -> None:
    assert asked().delay_s(REFUSED) == 1.5


def test_an_error_tells_when_to_try_again() -> None:
    assert [typed(error).retry_after_s for error in (REFUSED, LOST)] == [1.5, None]


def test_a_request_runs_on_from_its_acceptance_to_its_end() -> None:
    resumption = asked(accepted=False)
    states = [resumption.runs_on]
    resumption.note_metadata(ACCEPTED)
    states.append(resumption.runs_on)
    resumption.take(chunk(0, 0, 10, finish=pb.STOP, usage=True))
    assert [*states, resumption.runs_on] == [False, True, False]


def test_who_asks_the_same_with_the_same_id_asks_the_same() -> None:
    first, second = (asked(accepted=False, request_id="order-17", text="hi") for _ in range(2))
    assert first.next_request() == second.next_request()
    others = {asked(accepted=False, text="hi").next_request().sampling.seed for _ in range(20)}
    assert len({*others, first.next_request().sampling.seed}) == 21, "without an id, each is another"
    assert asked(accepted=False, request_id="order-17", sampling=pb.Sampling(seed=5)).next_request().sampling.seed == 5


def test_a_request_may_run_on_from_its_call_until_it_is_refused_or_complete() -> None:
    request = asked(accepted=False)
    assert not request.runs_on
    request.next_request()
    assert request.runs_on, "nobody has said anything yet"
    assert request.delay_s(REFUSED) is None
    assert not request.runs_on
