from __future__ import annotations

from ops.bench.changes.gaps import Answer, Outcomes, Seen, Window, Windows, look, middle, outcomes, summarize


def test_the_longest_gap_of_any_stream_is_seen() -> None:
    answers = [
        Answer(sent_s=0.0, times_s=[1.0, 1.5, 2.0]),
        Answer(sent_s=0.0, times_s=[1.0, 1.25, 2.0]),
    ]
    assert look(answers, Window(0.5, 3.0)).gap_s == 0.75


def test_a_gap_counts_whole_where_it_only_begins_or_ends_in_the_window() -> None:
    answer = Answer(sent_s=0.0, times_s=[1.0, 3.0, 6.0])
    assert look([answer], Window(2.5, 2.75)).gap_s == 2.0
    assert look([answer], Window(0.0, 1.5)).gap_s == 2.0
    assert look([answer], Window(4.0, 9.0)).gap_s == 3.0


def test_a_gap_beside_the_window_does_not_count() -> None:
    answer = Answer(sent_s=0.0, times_s=[1.0, 3.0])
    assert look([answer], Window(3.0, 4.0)).gap_s == 0.0


def test_time_between_two_answers_is_no_gap_but_a_wait() -> None:
    answers = [Answer(sent_s=0.0, times_s=[0.5, 0.625]), Answer(sent_s=1.0, times_s=[4.0, 4.25])]
    assert look(answers, Window(0.5, 4.5)) == Seen(gap_s=0.25, wait_s=3.0, tokens_per_s=1.0)


def test_an_answer_without_a_token_leaves_nothing_to_see() -> None:
    assert look([Answer(sent_s=1.0)], Window(0.0, 2.0)) == Seen(gap_s=0.0, wait_s=0.0, tokens_per_s=0.0)


def test_tokens_of_the_windows_end_belong_to_the_next() -> None:
    answer = Answer(sent_s=0.0, times_s=[1.0, 1.0, 2.0, 3.0])
    assert look([answer], Window(1.0, 3.0)).tokens_per_s == 1.5


def test_outcomes_are_those_of_answers_that_ran_in_a_window() -> None:
    answers = [
        Answer(sent_s=0.0, ended_s=1.0, problem="too early"),
        Answer(sent_s=1.0, ended_s=3.0, differs=True),
        Answer(sent_s=2.5, ended_s=2.75, problem="lost"),
        Answer(sent_s=4.0),
        Answer(sent_s=9.0, problem="too late"),
    ]
    found = outcomes(answers, [Window(2.0, 3.0), Window(5.0, 6.0)])
    assert found == Outcomes(answers=3, different=1, problems=("lost",))


def test_a_trial_sees_each_of_its_windows() -> None:
    windows = Windows(
        before=Window(0.0, 1.0),
        during=Window(1.0, 3.0),
        quiet=Window(3.0, 5.0),
        duration_s=1.5,
        recovered_s=0.5,
        others=0.25,
        quiet_others=0.125,
    )
    answer = Answer(sent_s=0.0, times_s=[0.25, 0.75, 1.0, 2.5, 3.0, 3.5, 4.0])
    trial = windows.trial([answer])
    assert (trial.before.gap_s, trial.during.gap_s, trial.quiet.gap_s) == (0.5, 1.5, 0.5)
    assert trial.before.wait_s == 0.25
    assert (trial.duration_s, trial.recovered_s) == (1.5, 0.5)
    assert (trial.others, trial.quiet_others) == (0.25, 0.125)


def test_a_summary_compares_each_trial_with_its_own_quiet_window() -> None:
    def trial(during_s: float, quiet_s: float) -> Windows:
        return Windows(
            before=Window(0.0, 1.0),
            during=Window(1.0, 1.0 + during_s),
            quiet=Window(1.0 + during_s, 1.0 + during_s + quiet_s),
            duration_s=during_s,
            recovered_s=None,
            others=during_s / 8,
            quiet_others=quiet_s,
        )

    trials = [
        trial(during_s, quiet_s).trial([Answer(sent_s=0.0, times_s=[1.0, 1.0 + during_s, 1.0 + during_s + quiet_s])])
        for during_s, quiet_s in ((4.0, 0.5), (2.0, 1.0), (3.0, 0.25))
    ]
    summary = summarize(trials)
    assert (summary.gap_s.p50, summary.gap_s.max) == (3.0, 4.0)
    assert (summary.more_gap_s.p50, summary.more_gap_s.max) == (2.75, 3.5)
    assert summary.recovered_s is None
    # Whichever window had more of them: 0.5, 1 and 0.375.
    assert (summary.others.p50, summary.others.max) == (0.5, 1.0)
    assert summary.trials == 3


def test_the_middle_of_one_value_is_that_value() -> None:
    assert (middle([2.0]).p50, middle([2.0]).max) == (2.0, 2.0)
