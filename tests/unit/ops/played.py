"""A server that is played, for whoever asks one over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc

VOCAB_SIZE = 1000


class Answering(rpc.GenerationServicer):
    """Gives every choice the same pieces of text, a token each; with `error`, every request fails with INTERNAL."""

    def __init__(self, pieces: Sequence[str] = ("a", "b"), *, has_tokenizer: bool = True, error: str = "") -> None:
        self.pieces, self.has_tokenizer, self.error = pieces, has_tokenizer, error
        self.prompts: list[tuple[int, ...]] = []
        self.requests: list[pb.GenerateRequest] = []

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(vocab_size=VOCAB_SIZE, max_model_len=512, has_tokenizer=self.has_tokenizer)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        await self._accept(request, context)
        num_choices = request.sampling.n or 1
        for index in range(num_choices):
            for offset, piece in enumerate(self._told()):
                yield pb.GenerateChunk(index=index, offset=offset, token_ids=[offset + 7], text=piece)
        for index in range(num_choices):
            usage = pb.Usage(completion_tokens=len(self.pieces)) if index == num_choices - 1 else None
            yield pb.GenerateChunk(index=index, offset=len(self.pieces), finish_reason=pb.LENGTH, usage=usage)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        await self._accept(request, context)
        token_ids = [offset + 7 for offset in range(len(self.pieces))]
        return pb.GenerateResponse(
            choices=[
                pb.Choice(index=index, token_ids=token_ids, text="".join(self._told()))
                for index in range(request.sampling.n or 1)
            ]
        )

    async def _accept(self, request: pb.GenerateRequest, context: Any) -> None:
        self.prompts.append(tuple(request.token_ids.ids))
        self.requests.append(request)
        if self.error:
            await context.abort(grpc.StatusCode.INTERNAL, self.error)
        await context.send_initial_metadata(((REQUEST_ID, request.request_id),))

    def _told(self) -> Sequence[str]:
        return self.pieces if self.has_tokenizer else [""] * len(self.pieces)


@contextlib.asynccontextmanager
async def playing(
    servicer: rpc.GenerationServicer, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """Its address, while it serves; with credentials, over TLS."""
    server = grpc.aio.server()
    rpc.add_GenerationServicer_to_server(servicer, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
