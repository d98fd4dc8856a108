"""What the leading balancer says of all workers: totals that only grow, and shares over workers."""

from __future__ import annotations

from balancer_svc.worker_totals import WorkerTotals
from collegium.fabric.metric_names import METRICS, SUMMED, series

HITS, REQUESTS = series("collegium_expert_hits_total"), series("collegium_expert_requests_total")
BUSY, RESIDENT = series("collegium_busy_seconds_total"), series("collegium_resident_experts")
OUT = series("collegium_worker_link_rows_total", direction="out")


def worker(hits: float, *, requests: float = 0.0, busy: float = 0.0, resident: float = 4.0) -> dict[str, float]:
    return {HITS: hits, REQUESTS: requests, BUSY: busy, RESIDENT: resident, OUT: 2 * hits, "slots": 9.0}


def test_counts_are_added_up_from_where_a_worker_was_first_heard_of() -> None:
    totals = WorkerTotals()
    totals.note([("a", worker(100)), ("b", worker(50))], 0.0)
    totals.note([("a", worker(110)), ("b", worker(53))], 1.0)
    found = totals.counters()
    assert found["collegium_workers_expert_hits_total"] == 13
    assert found['collegium_workers_link_rows_total{direction="out"}'] == 26
    assert found["collegium_workers_resident_experts"] == 8
    assert not any("slots" in key for key in found), "what is no metric is not shown"


def test_a_worker_that_leaves_takes_nothing_away_and_one_that_comes_brings_no_past() -> None:
    totals = WorkerTotals()
    totals.note([("a", worker(0))], 0.0)
    totals.note([("a", worker(10))], 1.0)
    totals.note([("b", worker(70))], 2.0)
    totals.note([("b", worker(75))], 3.0)
    found = totals.counters()
    assert found["collegium_workers_expert_hits_total"] == 15
    assert found["collegium_workers_resident_experts"] == 4


def test_a_worker_that_has_told_nothing_yet_begins_when_it_does() -> None:
    totals = WorkerTotals()
    totals.note([("a", {})], 0.0)
    assert totals.counters() == {}
    totals.note([("a", worker(5))], 1.0)
    totals.note([("a", worker(6))], 2.0)
    assert totals.counters()["collegium_workers_expert_hits_total"] == 1


def test_what_workers_did_while_another_balancer_led_is_not_of_this_ones_count() -> None:
    totals = WorkerTotals()
    totals.note([("a", worker(0))], 0.0)
    totals.note([("a", worker(10))], 1.0)
    totals.note([], 2.0)  # it does not lead
    totals.note([("a", worker(500))], 3.0)
    totals.note([("a", worker(501))], 4.0)
    assert totals.counters()["collegium_workers_expert_hits_total"] == 11


def test_shares_are_of_the_newest_interval_over_workers() -> None:
    totals = WorkerTotals()
    totals.note([("a", worker(0)), ("b", worker(0)), ("c", worker(0))], 0.0)
    newest = [
        ("a", worker(8, requests=10, busy=1.0)),
        ("b", worker(5, requests=10, busy=4.0)),
        ("c", worker(0, requests=0, busy=0.0)),
    ]
    totals.note(newest, 5.0)
    found = totals.counters()
    assert found['collegium_workers_hit_ratio{statistic="min"}'] == 0.5
    assert found['collegium_workers_hit_ratio{statistic="mean"}'] == 0.65, "one that was not asked has no rate"
    assert found['collegium_workers_busy_ratio{statistic="max"}'] == 0.8
    assert found['collegium_workers_busy_ratio{statistic="min"}'] == 0.0


def test_every_total_is_registered_as_the_balancers_with_the_kind_and_labels_of_the_workers() -> None:
    for name, total in SUMMED.items():
        of_one, of_all = METRICS[name], METRICS[total]
        assert (of_one.role, of_all.role) == ("worker", "balancer")
        assert (of_one.kind, of_one.labels) == (of_all.kind, of_all.labels)
