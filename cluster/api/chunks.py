"""Increments as protobuf."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.frontend.answer import MatchedStop, Piece
from cluster.frontend.record import Increment
from octet.ids import RequestId
from octet.messages import TokenLogprob
from octet.v1 import octet_pb2 as pb

_FINISH = {"stop": pb.STOP, "length": pb.LENGTH, "aborted": pb.ABORTED, None: pb.FINISH_REASON_UNSPECIFIED}


def to_chunk(request_id: RequestId, increment: Increment) -> pb.GenerateChunk:
    piece = increment.piece
    chunk = pb.GenerateChunk(
        request_id=request_id,
        index=piece.choice,
        offset=piece.offset,
        token_ids=piece.token_ids,
        text=piece.text,
        logprobs=_logprobs(piece.logprobs),
        finish_reason=_FINISH[piece.finish_reason],
        matched_stop=_matched_stop(piece),
        prompt_logprobs=_logprobs(increment.prompt_logprobs),
    )
    if increment.usage is not None:
        chunk.usage.prompt_tokens = increment.usage.prompt_tokens
        chunk.usage.completion_tokens = increment.usage.completion_tokens
        chunk.usage.cached_tokens = increment.usage.cached_tokens
    return chunk


def concatenate(choice: pb.Choice, chunk: pb.GenerateChunk) -> None:
    """Add a chunk of it to a choice."""
    choice.token_ids.extend(chunk.token_ids)
    choice.text += chunk.text
    choice.logprobs.extend(chunk.logprobs)
    choice.finish_reason = chunk.finish_reason
    if chunk.HasField("matched_stop"):
        choice.matched_stop.CopyFrom(chunk.matched_stop)


def _logprobs(logprobs: tuple[TokenLogprob, ...]) -> Iterator[pb.TokenLogprob]:
    for entry in logprobs:
        yield pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )


def _matched_stop(piece: Piece) -> pb.MatchedStop | None:
    matched: MatchedStop | None = piece.matched_stop
    if matched is None:
        return None
    return pb.MatchedStop(text=matched) if isinstance(matched, str) else pb.MatchedStop(token_id=matched)
