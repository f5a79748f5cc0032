"""Whose silence is death: the policy, played beat by beat."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from cluster.control.silence import Silence
from octet.config import HealthConfig
from octet.ids import WorkerId

A, B, C = WorkerId("decode-0"), WorkerId("experts-0"), WorkerId("experts-1")
HEALTH = HealthConfig(beat_s=0.2, silent_s=1.5, period_s=0.5, timeout_s=10.0)


class Played:
    """Members whose pulses are felt and that answer, unless it is said otherwise."""

    def __init__(self, *members: WorkerId, pulses: bool = True) -> None:
        self.members, self.now_s = members, 100.0
        self.silence = Silence(HEALTH, self.now_s)
        self.silence.keep(dict.fromkeys(members, pulses))

    def until_dead(
        self,
        for_s: float,
        *,
        still: Collection[WorkerId] = (),
        mute: Collection[WorkerId] = (),
        idle: Mapping[WorkerId, bool] | None = None,
        beat_s: float = HEALTH.beat_s,
    ) -> tuple[float, dict[WorkerId, str]]:
        """
        Args:
            still: have no pulse, and do not answer.
            mute: do not answer, though they have a pulse.
            beat_s: how often the observer comes to look.

        Returns: after how long somebody was taken for dead, and who.
        """
        begun_s = self.now_s
        while self.now_s - begun_s < for_s:
            self.now_s += beat_s
            for member in self.members:
                if member not in still and member not in mute:
                    self.silence.answered(member)
            felt = [member for member in self.members if member not in still]
            if dead := self.silence.judge(self.now_s, felt, idle or {}):
                return self.now_s - begun_s, dead
        return for_s, {}


def test_a_process_that_is_stopped_is_dead_within_two_seconds() -> None:
    after_s, dead = Played(A, B).until_dead(10, still=[B])
    assert (after_s <= 2.0 - HEALTH.beat_s, dead) == (True, {B: "no sign of life within 1.5 s"})


def test_one_that_pauses_for_less_lives() -> None:
    played = Played(A, B)
    for _ in range(5):
        assert played.until_dead(1.2, still=[B])[1] == {}
        assert played.until_dead(0.4)[1] == {}


def test_a_pulse_without_answers_is_life_as_long_as_the_process_computes() -> None:
    played = Played(A, B)
    assert played.until_dead(9.5, mute=[B], idle={B: False})[1] == {}
    assert played.until_dead(2, mute=[B], idle={B: False})[1] == {B: "no answer within 10 s"}


def test_one_that_sleeps_and_does_not_answer_is_wedged_and_dead_within_two_seconds() -> None:
    after_s, dead = Played(A, B).until_dead(10, mute=[B], idle={B: True})
    assert (after_s <= 2.0, dead) == (True, {B: "no answer within 1.5 s, and nothing runs in it"})


def test_where_nobody_answers_it_may_be_the_observers_calls_that_do_not_go_through() -> None:
    assert Played(A, B).until_dead(9.5, mute=[A, B], idle={A: True, B: True})[1] == {}


def test_where_no_pulse_at_all_is_felt_the_observer_is_cut_off() -> None:
    played = Played(A, B, C)
    assert played.until_dead(9.5, still=[A, B, C])[1] == {}
    assert played.until_dead(2, still=[A, B, C])[1].keys() == {A, B, C}


def test_one_that_falls_silent_alone_is_no_less_dead_for_others_that_do_later() -> None:
    played = Played(A, B, C)
    assert played.until_dead(1.0, still=[A])[1] == {}
    assert played.until_dead(1.0, still=[A, B])[1] == {A: "no sign of life within 1.5 s"}


@pytest.mark.parametrize("late_s", [1.0, 5.0, 60.0])
def test_the_observers_own_absence_is_nobodys_silence(late_s: float) -> None:
    played = Played(A, B)
    # It comes so late that answers of the last beat are all that it finds, and then not even those.
    assert played.until_dead(2 * late_s, still=[A], beat_s=late_s)[1] == {}


def test_a_machine_that_lets_nobody_run_in_time_kills_nobody() -> None:
    """The observer comes once in a second, and members skip every other beat."""
    played = Played(A, B)
    for _ in range(50):
        assert played.until_dead(1.0, still=[A], beat_s=1.0)[1] == {}
        assert played.until_dead(1.0, still=[B], beat_s=1.0)[1] == {}


def test_members_without_a_pulse_are_judged_by_their_answers() -> None:
    after_s, dead = Played(A, B, pulses=False).until_dead(20, mute=[A])
    assert (after_s > 10, dead) == (True, {A: "no answer within 10 s"})


def test_a_member_that_comes_begins_alive() -> None:
    played = Played(A)
    assert played.until_dead(1.0, still=[A])[1] == {}
    played.members = (A, B)
    played.silence.keep({A: True, B: True})
    assert played.until_dead(1.0, still=[A, B])[1].keys() == {A}


def test_looks_at_which_it_slept_count_only_in_a_row() -> None:
    """One that computes sleeps now and then, and answers late."""
    played = Played(A, B)
    for number in range(40):
        _, dead = played.until_dead(HEALTH.beat_s, mute=[B], idle={B: number % 3 != 0})
        assert dead == {}, f"at beat {number}"
    after_s, dead = played.until_dead(10, mute=[B], idle={B: True})
    assert dead == {B: "no answer within 1.5 s, and nothing runs in it"}
    assert after_s < 1.0
