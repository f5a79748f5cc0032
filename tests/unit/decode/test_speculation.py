"""Verifying drafts: right ones and wrong ones are put forward on purpose, and no token may change."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from decode.batch import DecodeBatch, RunningSequence
from decode.migration import Migration
from decode.speculation import MtpDrafter, Speculator
from model.batch import Batch, Span, build_batch
from model.pages import PagePool
from model.runner import ModelRunner
from model.sampler import sample
from octet.config import SpeculationConfig
from octet.errors import ExpertMissingError, PeerLostError
from octet.ids import RequestId, WorkerId
from octet.messages import Abort, Evicted, KvOffer, PrefillRequest, StepReport, TokenEvent, pack_ids
from octet.request import Output, Sampling, Stopping
from ops.local import CALLER, DECODE, PREFILL, LocalEngine
from router.kv_sender import KvSender
from router.leases import LeaseTable

_numbers = itertools.count()
ALWAYS = SpeculationConfig(num_speculative_tokens=4, adaptive=False)


class Oracle:
    """In the place of the MTP head: knows the answers, and lies at random."""

    def __init__(self) -> None:
        self.answers: dict[tuple[RequestId, int], list[int]] = {}
        self.truth = 0.7

    def draft(self, _: object, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        return [self._one(sequence, length) for sequence, length in zip(sequences, lengths, strict=True)]

    def _one(self, sequence: RunningSequence, length: int) -> list[int]:
        answer = self.answers[sequence.request.request_id, sequence.choice]
        known = answer[sequence.num_new_tokens :][:length]
        drafts = [*known, *[0] * (length - len(known))]
        return [token if random.random() < self.truth else (token + 1) % 1000 for token in drafts]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    oracle = Oracle()
    monkeypatch.setattr(MtpDrafter, "draft", lambda *args: oracle.draft(*args))
    return oracle


@pytest.fixture(scope="module")
def plain() -> Iterator[LocalEngine]:
    with contextlib.closing(LocalEngine(EMBEDDED_MODEL, page_size=4)) as engine:
        yield engine


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    with contextlib.closing(LocalEngine(EMBEDDED_MODEL, page_size=4, speculation=ALWAYS)) as engine:
        yield engine


def request(num_tokens: int = 7, **fields: object) -> PrefillRequest:
    made = PrefillRequest(
        request_id=RequestId(f"r{next(_numbers)}"),
        attempt=0,
        choices=(0,),
        token_ids=pack_ids([random.randrange(1000) for _ in range(num_tokens)]),
        num_prompt_tokens=num_tokens,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=24),
        output=Output(),
        priority=0,
        arrival_s=0.0,
        decode_worker=DECODE,
        frontend=WorkerId(CALLER),
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def events(engine: LocalEngine, asked: PrefillRequest) -> list[TokenEvent]:
    journal, found = engine.submit(asked), list[TokenEvent]()
    while not journal.ended:
        found += engine.step()
    return found


def told(events: Sequence[TokenEvent]) -> list[tuple[int, int, int, str | None]]:
    return sorted((event.choice, event.index, event.token_id, event.finish_reason or "") for event in events)


REQUESTS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled": {"sampling": Sampling(temperature=0.9, top_p=0.95, seed=3)},
    "penalized": {"sampling": Sampling(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7)},
    "penalized and sampled": {"sampling": Sampling(temperature=1.0, top_k=30, frequency_penalty=0.9, seed=8)},
    "choices": {"choices": (0, 1, 2), "sampling": Sampling(temperature=1.0, seed=1)},
    "one token": {"stopping": Stopping(max_new_tokens=1)},
    "two tokens": {"stopping": Stopping(max_new_tokens=2)},
    "a minimum": {"stopping": Stopping(max_new_tokens=20, min_new_tokens=9, stop_token_ids=tuple(range(0, 1000, 3)))},
    "stop ids": {"stopping": Stopping(max_new_tokens=24, stop_token_ids=tuple(range(0, 1000, 11)))},
}


@pytest.mark.parametrize("num_tokens", [7, 8], ids=["partial page", "full page"])
@pytest.mark.parametrize("name", REQUESTS)
def test_every_token_and_end_is_the_same(
    name: str, num_tokens: int, plain: LocalEngine, engine: LocalEngine, oracle: Oracle
) -> None:
    asked = request(num_tokens, **REQUESTS[name])
    expected = events(plain, asked)
    for choice in asked.choices:
        oracle.answers[asked.request_id, choice] = [event.token_id for event in expected if event.choice == choice]
    assert told(events(engine, asked)) == told(expected)
    load = engine.load()[DECODE]
    assert load.kv_pages_free == load.kv_pages_total
    assert load.accepted_tokens <= load.drafted_tokens


def test_each_token_has_its_own_logprobs(plain: LocalEngine, engine: LocalEngine, oracle: Oracle) -> None:
    asked = request(output=Output(logprobs=2))
    expected = events(plain, asked)
    oracle.answers[asked.request_id, 0] = [event.token_id for event in expected]
    for event, other in zip(events(engine, asked), expected, strict=True):
        assert event.logprob is not None
        assert other.logprob is not None
        assert event.logprob.token_id == event.token_id
        assert event.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)


def test_right_drafts_save_a_step_each(plain: LocalEngine, engine: LocalEngine, oracle: Oracle) -> None:
    asked = request()
    oracle.truth = 1.0
    oracle.answers[asked.request_id, 0] = [event.token_id for event in events(plain, asked)]
    journal, steps = engine.submit(asked), []
    while not journal.ended:
        steps += [len(committed)] if (committed := engine.step()) else []
    # The first token is the prefill worker's; then four drafts and the one after them; 24 in all.
    assert steps == [1, 5, 5, 5, 5, 3]
    assert engine.load()[DECODE].accepted_tokens == 18


def test_between_steps_no_page_is_held_for_drafts(plain: LocalEngine, engine: LocalEngine, oracle: Oracle) -> None:
    asked = request(random.randint(1, 12))
    oracle.truth = 0.0
    oracle.answers[asked.request_id, 0] = [event.token_id for event in events(plain, asked)]
    journal, running = engine.submit(asked), 0
    while not journal.ended:
        engine.step()
        load = engine.load()[DECODE]
        if load.running and (num_new := len(journal.token_ids(0))):
            running += 1
            held = load.kv_pages_total - load.kv_pages_free
            assert held <= -(-(asked.num_prompt_tokens + num_new) // 4)
    assert running > 10


def test_what_a_drafter_has_not_seen_stays_bounded_while_it_drafts_nothing(
    plain: LocalEngine, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MtpDrafter, "draft", lambda _, sequences, lengths: [[] for _ in sequences])
    asked = request(stopping=Stopping(max_new_tokens=100))
    journal, most = engine.submit(asked), 0
    while not journal.ended:
        engine.step()
        for sequence in engine._decode._batch.running:
            most = max(most, sum(map(len, sequence.unseen)))
    assert 1 < most <= 32


def test_a_step_that_loses_its_lane_may_be_run_again(
    plain: LocalEngine, engine: LocalEngine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request()
    expected = [event.token_id for event in events(plain, asked)]
    oracle.answers[asked.request_id, 0] = expected
    run, calls = ModelRunner.run, itertools.count()

    def failing(self: ModelRunner, spans: Sequence[object]) -> list[torch.Tensor]:
        if next(calls) % 2 == 1 and self is not engine.runner:
            raise PeerLostError("gone")
        return run(self, spans)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelRunner, "run", failing)
    journal, failures = engine.submit(asked), 0
    while not journal.ended:
        try:
            engine.step()
        except PeerLostError:
            failures += 1
    assert journal.token_ids(0) == expected
    assert failures > 0


def test_a_step_that_loses_its_lane_gives_back_the_pages_of_what_it_has_drafted(
    engine: LocalEngine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(random.randint(1, 12))
    oracle.answers[asked.request_id, 0] = [5] * 24
    engine.submit(asked)
    while not engine.load()[DECODE].running:
        engine.step()

    def failing(*_: object) -> list[torch.Tensor]:
        (sequence,) = engine._decode._batch.running
        held.append(len(sequence.pages))
        raise PeerLostError("gone")

    held: list[int] = []
    monkeypatch.setattr(ModelRunner, "run", failing)
    with pytest.raises(PeerLostError):
        engine.step()
    (sequence,) = engine._decode._batch.running
    load = engine.load()[DECODE]
    assert load.kv_pages_total - load.kv_pages_free == len(sequence.pages) == -(-len(sequence.token_ids) // 4)
    assert len(sequence.pages) < held[0]


def test_nothing_is_computed_behind_the_end_of_an_answer_though_it_was_drafted_rightly(
    plain: LocalEngine, engine: LocalEngine, oracle: Oracle
) -> None:
    oracle.truth = 1.0
    endless = request(sampling=Sampling(temperature=1.0, seed=random.randrange(2**32)))
    answer = [event.token_id for event in events(plain, endless)]
    # The first token is the prefill worker's, and behind every fifth nothing is drafted in its step.
    last = random.choice([index for index in range(1, 23) if index % 5 and answer[index] not in answer[:index]])
    stopping = Stopping(max_new_tokens=24, stop_token_ids=(answer[last],))
    asked = dataclasses.replace(endless, request_id=RequestId(f"r{next(_numbers)}"), stopping=stopping)
    oracle.answers[asked.request_id, 0] = answer
    assert [event.token_id for event in events(engine, asked)] == answer[: last + 1]
    assert engine.load()[DECODE].tokens == last


def test_choices_share_no_page_with_what_the_head_makes_of_their_own_tokens(engine: LocalEngine) -> None:
    """At the prompt's last position it sees the token behind it, which is another one for each."""
    engine.submit(request(8, choices=(0, 1, 2)))
    while engine.load()[DECODE].running < 3:
        engine.step()
    tables = [sequence.pages for sequence in engine._decode._batch.running]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 3


def test_answers_and_drafts_attend_token_by_token_and_prompts_never(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, bool]] = set()

    def noting(spans: Sequence[Span], pool: PagePool, device: torch.device) -> tuple[Batch, list[slice]]:
        seen.update((PREFILL if pool is engine.runner.pool else DECODE, span.by_token) for span in spans)
        return build_batch(spans, pool, device)

    monkeypatch.setattr("model.runner.build_batch", noting)
    events(engine, request(1))
    assert seen == {(PREFILL, False), (DECODE, True)}


def test_a_draft_whose_expert_is_missing_is_only_not_made(
    plain: LocalEngine, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise ExpertMissingError("layer 4: no expert in slots [3]")

    monkeypatch.setattr(ModelRunner, "draft", missing)
    asked = request()
    assert told(events(engine, asked)) == told(events(plain, asked))
    assert engine.load()[DECODE].drafted_tokens == 0


def test_cancelled_requests_leave_no_page_behind(engine: LocalEngine, oracle: Oracle) -> None:
    for _ in range(4):
        requests = [request(random.randint(1, 20), choices=(0, 1)) for _ in range(5)]
        oracle.answers = {(r.request_id, c): [5] * 24 for r in requests for c in r.choices}
        journals = [engine.submit(each) for each in requests]
        for _ in range(random.randint(1, 8)):
            engine.step()
        for each, journal in zip(requests, journals, strict=True):
            if random.random() < 0.6:
                for worker in (engine._prefill, engine._decode):
                    worker.handle(Abort(request_id=each.request_id))
                for choice in each.choices:
                    journal.end(choice)
        while not all(journal.ended for journal in journals) or any(
            load.kv_pages_free < load.kv_pages_total for load in engine.load().values()
        ):
            engine.step()
    assert {load.kv_pages_free for load in engine.load().values()} == {engine.load()[PREFILL].kv_pages_total}


def test_drafts_are_counted_with_those_that_stood(plain: LocalEngine, engine: LocalEngine, oracle: Oracle) -> None:
    """Four a step, of which the last step drafts what is left."""
    asked = request()
    oracle.truth = 1.0
    oracle.answers[asked.request_id, 0] = [event.token_id for event in events(plain, asked)]
    events(engine, asked)
    load = engine.load()[DECODE]
    assert (load.drafted_tokens, load.accepted_tokens) == (18, 18)


class Silent:
    """Drafts nothing."""

    def draft(self, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        return [[] for _ in sequences]

    def note(self, *_: object) -> None:
        return


@pytest.mark.parametrize("right", range(5))
def test_of_drafts_behind_a_wrong_one_nothing_is_learnt(right: int) -> None:
    asked, drafted = request(), random.sample(range(1000), 4)
    new = [*drafted[:right], 1000]
    sequence = RunningSequence(request=asked, choice=0, token_ids=[1, 2, 3, *new], pages=[])
    speculator = Speculator(Silent(), SpeculationConfig(num_speculative_tokens=4, adaptive=True))
    speculator.note([sequence], [drafted], [torch.zeros(len(new), 2)])
    assert (speculator.num_drafted, speculator.num_accepted) == (4, right)
    assert speculator._policy is not None
    assert speculator._policy.acceptance == (right + 1) / (min(right + 1, 4) + 2)


def test_who_leaves_hands_no_sequence_over_of_which_its_drafter_has_not_seen_everything(engine: LocalEngine) -> None:
    leases = LeaseTable(lease_s=60.0)
    sender = KvSender(engine._decode._runner.cache, leases, {})
    engine._decode._migration = Migration(DECODE, leases, sender)
    engine.submit(request())
    while not engine._decode.load().running:
        engine.step()
    engine._decode.hand_over_to([WorkerId("decode-1")])
    said = [message for _, message in engine._decode.step(0.0)]
    assert not any(isinstance(message, KvOffer) for message in said)
    told = [event for message in said if isinstance(message, StepReport) for event in message.events]
    assert [type(event) for event in told] == [Evicted]
    assert engine._decode.load().kv_pages_free == engine._decode.load().kv_pages_total
    sender.close()


def running(num_tokens: int, **fields: object) -> RunningSequence:
    """A sequence with its first new token, and one position that no drafter has seen."""
    token_ids = random.choices(range(1000), k=num_tokens + 1)
    asked = request(num_tokens, stopping=Stopping(max_new_tokens=100), **fields)
    return RunningSequence(request=asked, choice=0, token_ids=token_ids, pages=[], unseen=[torch.zeros(1, 2)])


class Head:
    """In the place of the model's: its output is one more than its input, and says which token is the likeliest."""

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.logits = logits
        self.asked: list[list[Span]] = []

    def draft(self, spans: Sequence[Span], hidden_BH: torch.Tensor) -> torch.Tensor:
        assert len(hidden_BH) == len(spans)
        self.asked.append(list(spans))
        return hidden_BH + 1


def drafts_of(head: Head, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
    any_head: Any = head
    return MtpDrafter(any_head).draft(sequences, lengths)


def test_each_sequence_is_drafted_for_from_its_own_hidden_state_as_far_as_it_was_asked() -> None:
    lengths = random.sample(range(8), 8)
    sequences = [running(random.randint(1, 9)) for _ in lengths]
    for number, sequence in enumerate(sequences):
        sequence.unseen = [torch.full((1, 2), 100.0 * number)]
    head = Head(lambda hidden_BH: torch.nn.functional.one_hot(hidden_BH[:, 0].long(), 1000).float())
    expected = [[100 * number + 1 + depth for depth in range(length)] for number, length in enumerate(lengths)]
    assert drafts_of(head, sequences, lengths) == expected
    for depth, spans in enumerate(head.asked):
        # Each token at the position before its own.
        ahead = [
            (len(sequence.token_ids) + depth - 2, [sequence.token_ids[-1], *drafts][depth])
            for sequence, drafts in zip(sequences, expected, strict=True)
            if depth < len(drafts)
        ]
        assert [(span.start, *span.token_ids) for span in spans] == ahead


@pytest.mark.parametrize("sampling", ["sampled", "penalized and sampled"])
def test_a_draft_is_drawn_with_the_noise_and_the_penalties_of_its_own_position(sampling: str) -> None:
    """A head that knows the model would otherwise be wrong whenever tokens are drawn."""
    logits_V = torch.randn(1000)
    drawn_from: dict[str, Sampling] = {
        "sampled": Sampling(temperature=2.0, seed=random.randrange(2**32)),
        "penalized and sampled": Sampling(temperature=0.1, frequency_penalty=2.0, seed=random.randrange(2**32)),
    }
    sequence = running(5, sampling=drawn_from[sampling])
    (drafts,) = drafts_of(Head(lambda hidden_BH: logits_V.repeat(len(hidden_BH), 1)), [sequence], [6])
    for draft in drafts:
        assert sample(logits_V.unsqueeze(0), [sequence.sample_row()]) == [draft]
        sequence.token_ids.append(draft)


def test_a_head_whose_numbers_overflow_drafts_tokens_that_there_are() -> None:
    head = Head(lambda hidden_BH: torch.full((len(hidden_BH), 1000), torch.nan))
    (drafts,) = drafts_of(head, [running(3)], [3])
    assert len(drafts) == 3
    assert all(0 <= draft < 1000 for draft in drafts)


class Telling(Silent):
    """Drafts what is never right, and says how much it was asked for and of whom it was told."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.noted: list[tuple[list[RunningSequence], list[list[int]], list[torch.Tensor]]] = []

    def draft(self, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        self.lengths.append(max(lengths))
        return [[1000] * length for length in lengths]

    def note(self, *noted: Any) -> None:
        self.noted.append(noted)


def speculate(step_s: Callable[[int], float], num_steps: int, num_sequences: int, num_tokens: int = 4) -> list[int]:
    """The lengths drafted in each step of a world in which a step takes so long and no draft is right."""
    now_s, pool, drafter, chosen = [100.0], PagePool(64, 4), Telling(), []
    batch = DecodeBatch(pool, 16)
    batch.running = [running(3) for _ in range(num_sequences)]
    config = SpeculationConfig(num_speculative_tokens=num_tokens, adaptive=True)
    speculator = Speculator(drafter, config, lambda: now_s[0])
    for _ in range(num_steps):
        drafts = speculator.draft(batch)
        batch.trim()
        chosen.append(max(map(len, drafts)))
        now_s[0] += step_s(chosen[-1])
        speculator.note(batch.running, drafts, [torch.zeros(1, 2)] * num_sequences)
        # What is between two steps is no part of either.
        now_s[0] += random.uniform(0, 100)
    return chosen


@pytest.mark.parametrize("num_sequences", [1, 3, 8])
def test_the_speculator_learns_what_steps_of_each_length_take(num_sequences: int) -> None:
    chosen = speculate(lambda length: 1.0 + 0.5 * length, 64, num_sequences)
    assert set(chosen[:10]) == {0, 1, 2, 3, 4}
    assert chosen[32:].count(0) >= 30
    # Longer steps take less time here, for whatever reason: only the clock can tell.
    chosen = speculate(lambda length: 9.0 - 2.0 * length, 64, num_sequences)
    assert chosen[32:].count(4) >= 30


def test_a_drafter_hears_nothing_of_sequences_that_have_ended() -> None:
    """Their pages are somebody else's by then."""
    sequences, drafter = [running(3) for _ in range(6)], Telling()
    for sequence in random.sample(sequences, 3):
        sequence.ended = True
    drafts = [[number] for number in range(6)]
    hidden = [torch.full((1, 2), float(number)) for number in range(6)]
    Speculator(drafter, ALWAYS).note(sequences, drafts, hidden)
    ((told_of, told_drafts, told_hidden),) = drafter.noted
    going_on = [number for number, sequence in enumerate(sequences) if not sequence.ended]
    assert [sequence.request.request_id for sequence in told_of] == [
        sequences[number].request.request_id for number in going_on
    ]
    assert told_drafts == [[number] for number in going_on]
    assert [hidden_TH[0, 0].item() for hidden_TH in told_hidden] == going_on
