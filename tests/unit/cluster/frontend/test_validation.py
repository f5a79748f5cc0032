from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cluster.frontend.validation import GenerateSpec, Limits, chat_messages, check_ids, parse_request
from cluster.planning import EMBEDDED_MODEL, make_plan
from model.config import GenerationDefaults
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.errors import RequestError
from octet.messages import unpack_ids
from octet.v1 import octet_pb2 as pb

VOCAB, CONTEXT, PAGE, DECODE_PAGES = 1024, 64, 16, 8
EOS = (1016, 1021, 1023)
TOKENIZER = Tokenizer.open(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def limits() -> Limits:
    plan = make_plan(
        load_config(
            None,
            [
                f"model.max_model_len={CONTEXT}",
                f"kv={{page_size: {PAGE}, prefill_pages: {DECODE_PAGES}, decode_pages: {DECODE_PAGES}}}",
                "frontend={max_n: 6, max_logprobs: 5, max_stop_strings: 2, default_max_new_tokens: 12}",
            ],
        )
    )
    return Limits(
        config=plan.config,
        model=plan.model,
        generation=GenerationDefaults(),
        max_model_len=plan.max_model_len,
        decode_pages=plan.decode_pages,
    )


def message(num_tokens: int = 3, **fields: Any) -> pb.GenerateRequest:
    if not {"text", "chat", "token_ids"} & set(fields):
        fields["token_ids"] = pb.TokenIds(ids=range(num_tokens))
    return pb.GenerateRequest(**fields)


def parse(message: pb.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None = TOKENIZER) -> GenerateSpec:
    return parse_request(message, limits, tokenizer)


def sampling(**fields: Any) -> pb.GenerateRequest:
    return message(sampling=pb.Sampling(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return message(stopping=pb.Stopping(**fields))


def chat(*messages: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.Message(role=role, content=content) for role, content in messages])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (message(text=""), "text"),
        (message(0), "token_ids.ids"),
        (message(chat=chat()), "chat.messages"),
        (message(chat=chat(("user", "hi"), ("", "x"))), "chat.messages[1].role"),
        (message(token_ids=pb.TokenIds(ids=[1, VOCAB])), "token_ids.ids[1]"),
        (message(CONTEXT), "token_ids.ids"),
        (message(text="a " * 400), "text"),
        (message(chat=chat(("user", "a " * 400))), "chat"),
        (stopping(max_new_tokens=0), "stopping.max_new_tokens"),
        (stopping(max_new_tokens=CONTEXT - 2), "stopping.max_new_tokens"),
        (stopping(min_new_tokens=13), "stopping.min_new_tokens"),
        (stopping(max_new_tokens=2, min_new_tokens=3), "stopping.min_new_tokens"),
        (stopping(stop_token_ids=[1, 2, VOCAB]), "stopping.stop_token_ids[2]"),
        (stopping(stop=["a", "b", "c"]), "stopping.stop"),
        (stopping(stop=["a", ""]), "stopping.stop"),
        (sampling(n=0), "sampling.n"),
        (sampling(n=7), "sampling.n"),
        (message(DECODE_PAGES * PAGE - 5 * PAGE + 1, sampling=pb.Sampling(n=6)), "sampling.n"),
        (sampling(temperature=-0.1), "sampling.temperature"),
        (sampling(temperature=math.nan), "sampling.temperature"),
        (sampling(temperature=math.inf), "sampling.temperature"),
        (sampling(top_p=0.0), "sampling.top_p"),
        (sampling(top_p=1.01), "sampling.top_p"),
        (sampling(top_p=math.nan), "sampling.top_p"),
        (sampling(min_p=-0.1), "sampling.min_p"),
        (sampling(min_p=1.1), "sampling.min_p"),
        (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (sampling(repetition_penalty=-1.0), "sampling.repetition_penalty"),
        (sampling(presence_penalty=2.5), "sampling.presence_penalty"),
        (sampling(presence_penalty=-2.5), "sampling.presence_penalty"),
        (sampling(frequency_penalty=2.5), "sampling.frequency_penalty"),
        (sampling(frequency_penalty=-math.inf), "sampling.frequency_penalty"),
        (message(output=pb.Output(logprobs=6)), "output.logprobs"),
        (message(output=pb.Output(stream_interval=0)), "output.stream_interval"),
        (message(output=pb.Output(stream_interval=8193)), "output.stream_interval"),
        (message(sampling=pb.Sampling(n=6), output=pb.Output(stream_interval=8192 // 6 + 1)), "output.stream_interval"),
        (message(request_id="e" * 257), "request_id"),
    ],
)
def test_a_wrong_request_names_its_field(limits: Limits, request_: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(request_, limits)
    assert caught.value.field == field
    assert f"'{field}'" in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (message(text="hi"), "text"),
        (message(chat=chat(("user", "hi"))), "chat"),
        (stopping(stop=["a"]), "stopping.stop"),
    ],
)
def test_without_a_tokenizer_text_is_refused(limits: Limits, request_: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        parse(request_, limits, None)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "request_",
    [
        message(1),
        message(CONTEXT - 1),
        message(token_ids=pb.TokenIds(ids=[VOCAB - 1])),
        stopping(max_new_tokens=CONTEXT - 3),
        stopping(min_new_tokens=12),
        stopping(stop=["a", "b"], stop_token_ids=[VOCAB - 1]),
        sampling(n=1),
        sampling(n=6),
        sampling(temperature=100.0, top_p=1.0, min_p=1.0, repetition_penalty=100.0),
        sampling(temperature=0.0, min_p=0.0, presence_penalty=-2.0, frequency_penalty=2.0),
        message(output=pb.Output(logprobs=5, prompt_logprobs=True)),
        message(output=pb.Output(stream_interval=1)),
        message(sampling=pb.Sampling(n=6), output=pb.Output(stream_interval=8192 // 6)),
        message(request_id="e" * 256),
    ],
)
def test_a_request_at_its_limits_is_accepted(limits: Limits, request_: pb.GenerateRequest) -> None:
    assert parse(request_, limits).request.attempt == 0


def test_token_ids_are_served_without_a_tokenizer(limits: Limits) -> None:
    assert unpack_ids(parse(message(4), limits, None).request.token_ids) == [0, 1, 2, 3]


def test_a_text_is_encoded(limits: Limits) -> None:
    assert TOKENIZER is not None
    request = parse(message(text="The kettle"), limits).request
    assert unpack_ids(request.token_ids) == TOKENIZER.encode("The kettle")
    assert request.num_prompt_tokens == len(TOKENIZER.encode("The kettle"))


def test_a_conversation_goes_through_the_chat_template(limits: Limits) -> None:
    assert TOKENIZER is not None
    request = parse(message(chat=chat(("user", "hi"))), limits).request
    assert unpack_ids(request.token_ids) == TOKENIZER.apply_chat_template([("user", "hi")])


def test_an_absent_field_takes_the_models_default(limits: Limits) -> None:
    defaults = GenerationDefaults(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1)
    got = parse(message(), dataclasses.replace(limits, generation=defaults)).request.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty) == (0.7, 0.9, 40, 0.05, 1.1)


def test_an_explicit_zero_is_a_zero(limits: Limits) -> None:
    defaults = GenerationDefaults(temperature=0.7, top_k=40, min_p=0.05)
    zeros = sampling(temperature=0.0, top_k=0, min_p=0.0, seed=0)
    got = parse(zeros, dataclasses.replace(limits, generation=defaults)).request.sampling
    assert (got.temperature, got.top_k, got.min_p, got.seed) == (0.0, 0, 0.0, 0)


def test_an_absent_message_is_a_request_of_defaults(limits: Limits) -> None:
    spec = parse(message(), limits)
    assert (spec.request.choices, spec.request.output.logprobs, spec.stop_strings) == ((0,), None, ())


def test_logprobs_of_zero_differ_from_none(limits: Limits) -> None:
    assert parse(message(output=pb.Output(logprobs=0)), limits).request.output.logprobs == 0


def test_each_request_without_a_seed_gets_another_one(limits: Limits) -> None:
    assert len({parse(message(), limits).request.sampling.seed for _ in range(8)}) == 8


def test_the_largest_seed_is_kept(limits: Limits) -> None:
    assert parse(sampling(seed=2**64 - 1), limits).request.sampling.seed == 2**64 - 1


def test_each_request_without_an_id_gets_another_one(limits: Limits) -> None:
    assert len({parse(message(), limits).request.request_id for _ in range(8)}) == 8


@pytest.mark.parametrize(("generation", "expected"), [(None, 12), (20, 20), (1000, CONTEXT - 3)])
def test_the_default_length_is_the_models_then_the_servers_within_the_context(
    limits: Limits, generation: int | None, expected: int
) -> None:
    changed = dataclasses.replace(limits, generation=GenerationDefaults(max_new_tokens=generation))
    assert parse(message(3), changed).request.stopping.max_new_tokens == expected


def test_an_explicit_length_overrides_the_models(limits: Limits) -> None:
    changed = dataclasses.replace(limits, generation=GenerationDefaults(max_new_tokens=20))
    assert parse(stopping(max_new_tokens=5), changed).request.stopping.max_new_tokens == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, EOS),
        ({"stop_token_ids": [5, 1016]}, (*EOS, 5)),
        ({"ignore_eos": True}, ()),
        ({"ignore_eos": True, "stop_token_ids": [5]}, (5,)),
    ],
)
def test_the_models_stop_ids_hold_beside_the_requests_own(
    limits: Limits, fields: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert parse(stopping(**fields), limits).request.stopping.stop_token_ids == expected


def test_n_choices_are_numbered_from_zero(limits: Limits) -> None:
    assert parse(sampling(n=3), limits).request.choices == (0, 1, 2)


def test_what_else_was_asked_is_kept(limits: Limits) -> None:
    spec = parse(message(request_id="mine", priority=-3, stopping=pb.Stopping(stop=["x"])), limits)
    assert (spec.request.request_id, spec.request.priority, spec.stop_strings) == ("mine", -3, ("x",))


def test_later_requests_arrive_later(limits: Limits) -> None:
    arrivals = [parse(message(), limits).request.arrival_s for _ in range(3)]
    assert arrivals == sorted(arrivals)


def test_chat_messages_are_pairs() -> None:
    assert chat_messages(chat(("system", ""), ("user", "hi"))) == [("system", ""), ("user", "hi")]


def test_an_id_outside_the_vocabulary_is_named_by_its_index() -> None:
    with pytest.raises(RequestError, match=r"ids\[2\].*found 9.*below the vocabulary's 9"):
        check_ids([0, 8, 9], "ids", 9)


def test_the_digest_is_that_of_the_body_without_what_was_received(limits: Limits) -> None:
    asked = message(request_id="r", sampling=pb.Sampling(seed=1))
    again = message(request_id="r", sampling=pb.Sampling(seed=1), received=[pb.TokenIds(ids=[5])])
    other = message(request_id="r", sampling=pb.Sampling(seed=2))
    digests = [parse(each, limits).digest for each in (asked, again, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("request_id", "resumable", "keep"), [("", False, False), ("r", False, True), ("", True, True), ("r", True, True)]
)
def test_an_answer_is_kept_if_anybody_can_ask_for_it(
    limits: Limits, request_id: str, resumable: bool, keep: bool
) -> None:
    spec = parse(message(request_id=request_id, resumable=resumable), limits)
    assert (spec.keep, spec.resumable) == (keep, resumable)


def test_received_tokens_are_taken_by_choice(limits: Limits) -> None:
    asked = message(sampling=pb.Sampling(n=3, seed=1), received=[pb.TokenIds(ids=[5, 6]), pb.TokenIds()])
    assert parse(asked, limits).received == ((5, 6), ())


def test_an_answer_that_was_sampled_goes_on_with_its_seed_or_not_at_all(limits: Limits) -> None:
    sampled, greedy = pb.Sampling(temperature=0.5), pb.Sampling(temperature=0)
    with pytest.raises(RequestError, match=r"'sampling.seed'.*the seed of the answer"):
        parse(message(sampling=sampled, received=[pb.TokenIds(ids=[5])]), limits)
    assert parse(message(sampling=sampled, received=[pb.TokenIds()]), limits).received == ((),)
    assert parse(message(sampling=greedy, received=[pb.TokenIds(ids=[5])]), limits).received == ((5,),)


@pytest.mark.parametrize(
    ("received", "field"),
    [([pb.TokenIds(), pb.TokenIds()], "received"), ([pb.TokenIds(ids=[3, VOCAB])], r"received\[0\].ids\[1\]")],
    ids=["more choices than there are", "an id that is none"],
)
def test_impossible_received_tokens_are_refused(limits: Limits, received: list[pb.TokenIds], field: str) -> None:
    with pytest.raises(RequestError, match=f"'{field}'"):
        parse(message(received=received), limits)


@pytest.mark.parametrize("request_id", ["î", "a b", "a\n", "\x7f"])
def test_an_id_that_metadata_cannot_tell_is_refused(limits: Limits, request_id: str) -> None:
    with pytest.raises(RequestError, match="visible ASCII"):
        parse(message(request_id=request_id), limits)
