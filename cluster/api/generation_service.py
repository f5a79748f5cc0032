"""`octet.v1.Generation`: protobuf in, protobuf out."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.api.chunks import concatenate, to_chunk
from cluster.api.pace import Pace
from cluster.api.status_codes import Context, abort
from cluster.frontend.frontend import Frontend
from cluster.frontend.record import Reader
from cluster.frontend.validation import GenerateSpec, check_ids, input_ids, parse_request, require_tokenizer
from model.config import ARCHITECTURE
from octet.errors import OctetError, SlowReaderError
from octet.ids import RequestId
from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc

_LONG_BYTES = 2**15
"""A request of this size takes some milliseconds to tokenize."""
_CORES_PER_LONG = 4
"""So many of the machine's cores for each long request that is tokenized: streams go on meanwhile."""

_T = TypeVar("_T")


class GenerationService(rpc.GenerationServicer):
    def __init__(self, frontend: Frontend, model_name: str, num_parameters: int, max_stall_s: float) -> None:
        """
        Args:
            max_stall_s: a client that takes no chunk for so long is cut off.
        """
        self._frontend, self._model_name, self._num_parameters = frontend, model_name, num_parameters
        self._max_stall_s, self._pace = max_stall_s, Pace()
        num_threads = max(1, (os.cpu_count() or 1) // _CORES_PER_LONG)
        self._long = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        choices: dict[int, pb.Choice] = {}
        async with _errors_as_status(context):
            spec = await self._parse(request, context)
            with self._frontend.generate(spec, context.time_remaining(), whole=True) as reader:
                await _tell_accepted(context, reader)
                async for increment in reader.increments():
                    chunk = to_chunk(reader.request_id, increment)
                    concatenate(choices.setdefault(chunk.index, pb.Choice(index=chunk.index)), chunk)
                    response.prompt_logprobs.extend(chunk.prompt_logprobs)
                    if chunk.HasField("usage"):
                        response.usage.CopyFrom(chunk.usage)
                response.request_id = reader.request_id
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with _errors_as_status(context):
            spec = await self._parse(request, context)
            with self._frontend.generate(spec, context.time_remaining()) as reader:
                await self._stream(reader, context)

    async def GenerationResume(self, request: pb.GenerationResumeRequest, context: Context) -> None:
        async with _errors_as_status(context):
            request_id, offsets = RequestId(request.request_id), request.offsets
            with self._frontend.resume(request_id, offsets, context.time_remaining()) as reader:
                await self._stream(reader, context)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._frontend.abort(RequestId(request.request_id))
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with _errors_as_status(context):
            tokenizer = require_tokenizer(self._frontend.tokenizer, request.WhichOneof("input") or "input")
            return pb.TokenizeResponse(token_ids=await self._tokenize(request, lambda: input_ids(request, tokenizer)))
        raise AssertionError("an error is raised again as a status")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with _errors_as_status(context):
            tokenizer = require_tokenizer(self._frontend.tokenizer, "token_ids")
            token_ids = list(request.token_ids)
            check_ids(token_ids, "token_ids", self._frontend.limits.model.vocab_size)
            return pb.DetokenizeResponse(text=tokenizer.decode(token_ids, request.keep_special_tokens))
        raise AssertionError("an error is raised again as a status")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        model, tokenizer = self._frontend.limits.model, self._frontend.tokenizer
        return pb.GetModelInfoResponse(
            model=self._model_name,
            architecture=ARCHITECTURE,
            vocab_size=model.vocab_size,
            max_model_len=self._frontend.limits.max_model_len,
            num_layers=model.num_hidden_layers,
            num_experts=model.n_routed_experts,
            num_experts_per_tok=model.num_experts_per_tok,
            eos_token_ids=model.eos_token_ids,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
            num_parameters=self._num_parameters,
        )

    async def _parse(self, request: pb.GenerateRequest, context: Context) -> GenerateSpec:
        """Refuse what can be refused unread, before any work; then what is malformed."""
        self._frontend.refuse_early(RequestId(request.request_id), request.priority, context.time_remaining())
        limits, tokenizer = self._frontend.limits, self._frontend.tokenizer
        return await self._tokenize(request, lambda: parse_request(request, limits, tokenizer))

    async def _tokenize(self, request: pb.GenerateRequest | pb.TokenizeRequest, work: Callable[[], _T]) -> _T:
        """Long requests in threads of their own, a few at a time. Whose call ends before their turn are left out."""
        if request.ByteSize() <= _LONG_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._long, work)

    async def _stream(self, reader: Reader, context: Context) -> None:
        await _tell_accepted(context, reader)
        now_s, pace = asyncio.get_running_loop().time, self._pace
        with reader.interruptible(), _Patience(reader, self._max_stall_s) as patience:
            async for increment in reader.increments():
                begun_s = patience.since_s = now_s()
                await context.write(to_chunk(reader.request_id, increment))
                ended_s, patience.since_s = now_s(), math.inf
                pace.note(ended_s - begun_s, self._frontend.num_live, ended_s, time.thread_time())
                if pace.rest_s:
                    await asyncio.sleep(pace.rest_s)


class _Patience:
    """Cuts a reader off whose client takes no chunk. One timer for a whole stream: with a timeout around each chunk, 7%
    of the time of a frontend's thread went into those (`py-spy`, 32 streams)."""

    def __init__(self, reader: Reader, max_stall_s: float) -> None:
        self.since_s = math.inf
        """When the chunk that is being written began."""
        self._reader, self._max_stall_s = reader, max_stall_s

    def __enter__(self) -> _Patience:
        self._look_again_in(self._max_stall_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look_again_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left_s = self._max_stall_s - max(0.0, asyncio.get_running_loop().time() - self.since_s)
        if left_s > 0:
            self._look_again_in(left_s)
        else:
            text = f"the client took nothing for {self._max_stall_s:g} s (frontend.max_stall_s)"
            self._reader.cut(SlowReaderError(text))


@contextlib.asynccontextmanager
async def _errors_as_status(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except OctetError as error:
        await abort(context, error)


async def _tell_accepted(context: Context, reader: Reader) -> None:
    """Before any token: from now on the client may resume."""
    await context.send_initial_metadata(((REQUEST_ID, reader.request_id),))
