from __future__ import annotations

import pytest

from octet.ids import LeaseId, RequestId
from router.leases import LeaseTable

LEASE_S = 10.0
A, B = LeaseId("a"), LeaseId("b")


@pytest.fixture
def table() -> LeaseTable:
    """Lease a of request 1, granted at 100, and lease b of request 2's choice 3, granted at 105."""
    table = LeaseTable(LEASE_S)
    table.grant(A, RequestId("1"), 0, (0, 1), [4, 5], 100.0)
    table.grant(B, RequestId("2"), 7, (3,), [6], 105.0)
    return table


def test_a_lease_holds_its_pages_until_its_deadline(table: LeaseTable) -> None:
    assert table.reclaim(109.9) == []
    assert table.reclaim(110.0) == [4, 5]
    assert table.reclaim(115.0) == [6]


def test_an_acknowledged_lease_gives_its_pages_back(table: LeaseTable) -> None:
    table.acknowledge(A)
    assert table.reclaim(100.0) == [4, 5]


def test_pages_come_back_once(table: LeaseTable) -> None:
    table.acknowledge(A)
    table.reclaim(100.0)
    table.acknowledge(A)
    assert table.reclaim(100.0) == []


def test_an_acknowledgement_of_an_unknown_lease_does_nothing(table: LeaseTable) -> None:
    table.acknowledge(LeaseId("unknown"))
    assert len(table) == 2


def test_an_aborted_request_gives_its_pages_back(table: LeaseTable) -> None:
    table.abort(RequestId("1"), None)
    assert table.reclaim(100.0) == [4, 5]


def test_an_aborted_choice_gives_back_pages_that_are_its_alone(table: LeaseTable) -> None:
    table.abort(RequestId("2"), 3)
    assert table.reclaim(100.0) == [6]


def test_an_aborted_choice_leaves_pages_that_others_need(table: LeaseTable) -> None:
    table.abort(RequestId("1"), 0)
    assert table.reclaim(100.0) == []


def test_an_aborted_attempt_gives_back_its_own_pages_alone(table: LeaseTable) -> None:
    table.abort(RequestId("1"), attempt=7)
    table.abort(RequestId("2"), attempt=7)
    assert table.reclaim(100.0) == [6]


def test_pages_of_a_live_lease_may_be_sent(table: LeaseTable) -> None:
    assert table.begin_sending(A) == [4, 5]


@pytest.mark.parametrize("lease_id", [A, LeaseId("unknown")])
def test_pages_of_a_lease_that_is_over_are_not_sent(table: LeaseTable, lease_id: LeaseId) -> None:
    table.acknowledge(A)
    assert table.begin_sending(lease_id) is None


def test_pages_of_a_reclaimed_lease_are_not_sent(table: LeaseTable) -> None:
    table.reclaim(110.0)
    assert table.begin_sending(A) is None


def test_pages_that_are_being_sent_come_back_only_afterwards(table: LeaseTable) -> None:
    table.begin_sending(A)
    table.abort(RequestId("1"), None)
    assert table.reclaim(1000.0) == [6]
    table.end_sending(A)
    assert table.reclaim(1000.0) == [4, 5]


def test_a_lease_counts_until_its_pages_are_back(table: LeaseTable) -> None:
    table.acknowledge(A)
    assert len(table) == 2
    table.reclaim(100.0)
    assert len(table) == 1


def test_a_renewed_lease_holds_its_pages_for_as_long_again(table: LeaseTable) -> None:
    table.renew(A)
    assert table.reclaim(109.0) == []
    assert table.reclaim(118.0) == [6]
    assert table.reclaim(119.0) == [4, 5]


def test_a_lease_that_is_over_cannot_be_renewed(table: LeaseTable) -> None:
    table.acknowledge(A)
    table.renew(A)
    assert table.reclaim(100.0) == [4, 5]
    table.renew(A)
    assert table.begin_sending(A) is None


def test_a_renewal_counts_though_nobody_looked_before_the_deadline(table: LeaseTable) -> None:
    """As when a step took long that was under way when it came."""
    table.renew(A)
    assert table.reclaim(112.0) == []
    assert table.reclaim(121.9) == [6]
    assert table.reclaim(122.0) == [4, 5]
