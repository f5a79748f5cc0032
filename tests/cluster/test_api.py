"""The gRPC API as a client sees it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.launch import RunningCluster
from octet.client import CallError, Client, make_request
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from tests.clusters import at_baseline, wait_until

_LONG: dict[str, Any] = {"max_new_tokens": 4000, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(client: Client) -> Iterator[None]:
    """Whatever a test does, pages, leases and queues are back to baseline after it."""
    yield
    wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")


def test_concatenated_chunks_equal_the_response(client: Client) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 40,
        "n": 3,
        "temperature": 1.0,
        "seed": 7,
        "logprobs": 2,
        "prompt_logprobs": True,
        "stop": [" the"],
    }
    response = client.generate("Some words to begin with", **options)
    chunks = list(client.stream("Some words to begin with", **options))

    for choice in response.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert [i for chunk in own for i in chunk.token_ids] == list(choice.token_ids)
        assert "".join(chunk.text for chunk in own) == choice.text
        _assert_close([entry for chunk in own for entry in chunk.logprobs], list(choice.logprobs))
        assert own[-1].finish_reason == choice.finish_reason
        assert own[-1].matched_stop == choice.matched_stop
        assert [chunk.offset for chunk in own] == [
            sum(len(before.token_ids) for before in own[:position]) for position in range(len(own))
        ]
    assert [chunk.HasField("usage") for chunk in chunks].count(True) == 1
    assert chunks[-1].usage == response.usage
    _assert_close(list(chunks[0].prompt_logprobs), list(response.prompt_logprobs))


def _assert_close(found: list[pb.TokenLogprob], expected: list[pb.TokenLogprob]) -> None:
    """Equal tokens; their numbers may differ by rounding, since the two calls were not batched alike."""
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    assert [len(entry.top) for entry in found] == [len(entry.top) for entry in expected]


def test_choices_of_one_request_differ_and_repeat_with_its_seed(client: Client) -> None:
    first = client.generate("Once", n=4, temperature=1.0, seed=3, max_new_tokens=16)
    again = client.generate("Once", n=4, temperature=1.0, seed=3, max_new_tokens=16)
    answers = [tuple(choice.token_ids) for choice in first.choices]
    assert len(set(answers)) == 4
    assert answers == [tuple(choice.token_ids) for choice in again.choices]


def test_text_ends_before_a_stop_string_that_crosses_tokens(client: Client) -> None:
    free = client.generate("It was raining", max_new_tokens=32).choices[0]
    stop = free.text[9:14]
    cut = client.generate("It was raining", max_new_tokens=32, stop=[stop]).choices[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == pb.STOP
    assert cut.matched_stop.text == stop
    assert len(cut.token_ids) < len(free.token_ids)


def test_a_stop_id_ends_the_answer_and_is_not_in_its_text(client: Client) -> None:
    free = client.generate("It was raining", max_new_tokens=8).choices[0]
    stop_id = free.token_ids[5]
    cut = client.generate("It was raining", max_new_tokens=8, stop_token_ids=[stop_id]).choices[0]
    at = list(free.token_ids).index(stop_id)
    assert list(cut.token_ids) == list(free.token_ids)[: at + 1]
    assert cut.matched_stop.token_id == stop_id
    assert cut.text == client.detokenize(list(free.token_ids)[:at])


def test_logprobs_are_those_of_the_chosen_tokens(client: Client) -> None:
    choice = client.generate("Numbers", max_new_tokens=6, logprobs=3).choices[0]
    for token_id, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry.token_id == token_id
        assert entry.top[0].token_id == token_id, "greedy takes the most likely"
        assert entry.logprob == pytest.approx(entry.top[0].logprob)
        assert sum(math.exp(a.logprob) for a in entry.top) <= 1


def test_prompt_logprobs_cover_every_prompt_token_but_the_first(client: Client) -> None:
    prompt = [5, 9, 300, 41, 7]
    response = client.generate(prompt, max_new_tokens=1, prompt_logprobs=True, logprobs=0)
    assert [entry.token_id for entry in response.prompt_logprobs] == prompt
    assert not response.prompt_logprobs[0].HasField("logprob")
    assert all(entry.logprob < 0 for entry in response.prompt_logprobs[1:])
    longer = client.generate(prompt[:3], max_new_tokens=1, logprobs=0, stop_token_ids=[])
    assert longer.usage.prompt_tokens == 3


def test_tokenize_and_detokenize_are_inverse(client: Client) -> None:
    text = "Ünïcode 🌧 and 中文, in one line."
    assert client.detokenize(client.tokenize(text)) == text


def test_chat_goes_through_the_template(client: Client) -> None:
    ids = client.tokenize([("system", "Be brief."), ("user", "Hello")])
    by_chat = client.generate([("system", "Be brief."), ("user", "Hello")], max_new_tokens=6)
    by_ids = client.generate(ids, max_new_tokens=6)
    assert by_chat.usage.prompt_tokens == len(ids)
    assert by_chat.choices == by_ids.choices


def test_model_info_describes_the_model(client: Client, embedded: RunningCluster) -> None:
    info = client.model_info()
    assert (info.architecture, info.num_experts, info.num_experts_per_tok) == ("Glm4MoeForCausalLM", 32, 8)
    assert info.max_model_len == embedded.plan.max_model_len
    assert info.has_tokenizer
    assert info.has_chat_template


def test_reflection_lists_both_services(embedded: RunningCluster) -> None:
    with grpc.insecure_channel(embedded.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"octet.v1.Generation", "octet.v1.Cluster", "grpc.health.v1.Health"} <= set(services)


@pytest.mark.parametrize("service", ["", "octet.v1.Generation", "octet.v1.Cluster"])
def test_a_ready_cluster_is_healthy(embedded: RunningCluster, service: str) -> None:
    with grpc.insecure_channel(embedded.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "text"),
        ([], {}, "token_ids.ids"),
        ([1024], {}, "token_ids.ids[0]"),
        ([1] * 5000, {}, "token_ids.ids"),
        ("a", {"max_new_tokens": 5000}, "stopping.max_new_tokens"),
        ("a", {"max_new_tokens": 0}, "stopping.max_new_tokens"),
        ("a", {"max_new_tokens": 4, "min_new_tokens": 5}, "stopping.min_new_tokens"),
        ("a", {"stop": [""]}, "stopping.stop"),
        ("a", {"stop": ["x"] * 17}, "stopping.stop"),
        ("a", {"stop_token_ids": [4096]}, "stopping.stop_token_ids[0]"),
        ("a", {"top_p": 0.0}, "sampling.top_p"),
        ("a", {"top_p": 1.5}, "sampling.top_p"),
        ("a", {"min_p": -0.1}, "sampling.min_p"),
        ("a", {"temperature": -1.0}, "sampling.temperature"),
        ("a", {"temperature": math.nan}, "sampling.temperature"),
        ("a", {"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ("a", {"presence_penalty": 3.0}, "sampling.presence_penalty"),
        ("a", {"frequency_penalty": -3.0}, "sampling.frequency_penalty"),
        ("a", {"n": 0}, "sampling.n"),
        ("a", {"n": 17}, "sampling.n"),
        ("a", {"logprobs": 21}, "output.logprobs"),
        ([("", "no role")], {}, "chat.messages[0].role"),
        ([("stranger", "hi")], {}, "chat"),
        ("a", {"request_id": "x" * 300}, "request_id"),
    ],
)
def test_an_invalid_argument_names_its_field(
    embedded: RunningCluster, prompt: object, options: dict[str, object], field: str
) -> None:
    request = make_request(prompt, **options)  # type: ignore[arg-type]
    with grpc.insecure_channel(embedded.address) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.GenerationStub(channel).Generate(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"'{field}'" in str(caught.value.details())
    details = error_details_pb2.BadRequest()
    call: Any = caught.value
    assert rpc_status.from_call(call).details[0].Unpack(details)
    assert details.field_violations[0].field == field


def test_a_request_without_input_is_invalid(embedded: RunningCluster) -> None:
    with grpc.insecure_channel(embedded.address) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.GenerationStub(channel).Generate(pb.GenerateRequest(), timeout=30)
    assert "'input'" in str(caught.value.details())


def test_a_live_request_id_already_exists(client: Client) -> None:
    stream = client.stream("first", request_id="twice", **_LONG)
    next(stream)
    with pytest.raises(CallError, match=r"ALREADY_EXISTS.*twice"):
        client.generate("second", request_id="twice")
    stream.close()


def test_abort_ends_the_stream_and_frees_every_pool(client: Client) -> None:
    stream = client.stream("endless", request_id="doomed", **_LONG)
    next(stream)
    client.abort("doomed")
    assert list(stream)[-1].finish_reason == pb.ABORTED
    wait_until(lambda: at_baseline(client.status()), 5, "pages back to baseline")


def test_abort_of_an_unknown_request_succeeds(client: Client) -> None:
    client.abort("nobody")


def test_a_client_that_goes_away_frees_every_pool(client: Client) -> None:
    before = client.status().requests_cancelled
    stream = client.stream("endless", **_LONG)
    next(stream)
    stream.close()
    wait_until(lambda: at_baseline(client.status()), 5, "pages back to baseline")
    assert client.status().requests_cancelled == before + 1


def test_a_deadline_in_decode_frees_every_pool(client: Client) -> None:
    with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
        client.generate("endless", timeout_s=0.5, **_LONG)
    wait_until(lambda: at_baseline(client.status()), 5, "pages back to baseline")


def test_a_deadline_in_prefill_frees_every_pool(client: Client) -> None:
    with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
        client.generate([7] * 4000, timeout_s=0.1, max_new_tokens=10)
    wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")


def test_many_clients_stream_at_once(client: Client, embedded: RunningCluster) -> None:
    alone = client.generate("together", max_new_tokens=24).choices[0].token_ids
    answers: list[list[int]] = []

    def stream_one() -> None:
        with Client(embedded.address, timeout_s=60) as own:
            answers.append([i for chunk in own.stream("together", max_new_tokens=24) for i in chunk.token_ids])

    threads = [threading.Thread(target=stream_one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [list(alone)] * 12
