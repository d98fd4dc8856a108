"""`collegium top`: rates, restarts, events, order and cuts, and that a frame fits its screen."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, Group

from collegium.cli import rates as r
from collegium.cli.columns import Column, age, bar, course, number, percent, share_out, size, table, whole
from collegium.cli.picture import Screen, picture
from collegium.cli.rates import Meter, Reading
from collegium.cli.rows import busiest_routers, busiest_workers
from collegium.cli.watching import Frame, Watch
from collegium.fabric.metrics import METRICS
from tests.watched import UNIX_S, balance, cluster, cluster_at, frame_of, gateway, router, seen, worker

TOTAL = "collegium_dispatches_total"


def reading(heard_s: float, **counters: float) -> Reading:
    return Reading(heard_s=heard_s, counters={name.replace("dispatches", TOTAL): n for name, n in counters.items()})


def texts(frame: Frame) -> list[str]:
    return [event.text for event in frame.new_events]


# Rates.


def test_every_name_that_is_read_is_registered() -> None:
    named = {value for name, value in vars(r).items() if name.isupper() and str(value).startswith("collegium_")}
    assert named <= METRICS.keys()
    assert len(named) > 20


def test_a_rate_is_the_gain_over_the_time_between_two_hearings_and_not_between_two_looks() -> None:
    meter = Meter(reading(10.0, dispatches=100.0), now_s=0.0)
    assert meter.rate(TOTAL) is None
    meter.take(reading(12.0, dispatches=150.0), now_s=1.0)
    assert meter.rate(TOTAL) == 25.0
    meter.take(reading(12.0, dispatches=150.0), now_s=2.0)  # the same again: nothing was heard
    assert meter.rate(TOTAL) == 25.0
    meter.take(reading(14.0, dispatches=150.0), now_s=3.0)  # nothing was done
    assert meter.rate(TOTAL) == 0.0


def test_two_hearings_right_after_each_other_make_no_rate_and_lose_no_gain() -> None:
    meter = Meter(reading(0.0, dispatches=0.0), now_s=0.0)
    meter.take(reading(0.01, dispatches=50.0), now_s=0.01)
    assert meter.rate(TOTAL) is None
    meter.take(reading(1.0, dispatches=100.0), now_s=1.0)
    assert meter.rate(TOTAL) == 100.0


def test_a_counter_that_went_down_means_a_process_that_started_anew() -> None:
    meter = Meter(reading(0.0, dispatches=100.0), now_s=0.0)
    meter.take(reading(1.0, dispatches=110.0), now_s=1.0)
    assert meter.take(reading(2.0, dispatches=3.0), now_s=2.0)
    assert meter.rate(TOTAL) is None
    assert not meter.take(reading(3.0, dispatches=8.0), now_s=3.0)
    assert meter.rate(TOTAL) == 5.0


def test_what_a_balancer_remembers_of_before_is_no_news() -> None:
    meter = Meter(reading(10.0, dispatches=100.0), now_s=0.0)
    meter.take(reading(12.0, dispatches=150.0), now_s=1.0)
    assert not meter.take(reading(3.0, dispatches=20.0), now_s=2.0)
    meter.take(reading(14.0, dispatches=170.0), now_s=3.0)
    assert meter.rate(TOTAL) == 10.0


def test_the_rates_of_a_process_that_is_silent_are_forgotten() -> None:
    meter = Meter(reading(0.0, dispatches=0.0), now_s=0.0)
    meter.take(reading(1.0, dispatches=10.0), now_s=1.0)
    meter.take(reading(1.0, dispatches=10.0), now_s=5.0)
    assert meter.rate(TOTAL) == 10.0
    meter.take(reading(1.0, dispatches=10.0), now_s=12.0)
    assert meter.rate(TOTAL) is None
    assert meter.level(TOTAL) == 10.0


def test_a_link_that_was_opened_anew_or_closed_has_no_rate_and_harms_no_other() -> None:
    meter = Meter(Reading(heard_s=0.0, counters={"rows_out/a": 50.0, "rows_out/b": 5.0, "rows_out/c": 1.0}), 0.0)
    meter.take(Reading(heard_s=1.0, counters={"rows_out/a": 2.0, "rows_out/b": 9.0, "rows_out/d": 3.0}), 1.0)
    assert [meter.rate(f"rows_out/{name}") for name in "abcd"] == [None, 4.0, None, 3.0]
    assert meter.peers("rows_out") == ["a", "b", "d"]


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=2, max_size=12))
def test_no_rate_is_ever_negative(steps: list[tuple[float, int, int]]) -> None:
    heard_s = 0.0
    meter = Meter(reading(heard_s, dispatches=0.0), now_s=heard_s)
    for span_s, total, link in steps:
        heard_s += span_s
        counters = {TOTAL: float(total), "rows_out/w": float(link)}
        meter.take(Reading(heard_s=heard_s, counters=counters), now_s=heard_s)
        rates = [meter.rate(name) for name in counters]
        assert all(rate is None or rate >= 0 for rate in rates)


def test_a_frame_has_the_rates_of_each_and_of_all() -> None:
    frame = frame_of(num_workers=2, num_routers=2)
    (one,) = frame.gateways
    assert (one.requests_per_s, one.failures_per_s, one.tokens_out_per_s) == (2.0, 0.0, 100.0)
    routers = [(row.tokens_in_per_s, row.tokens_out_per_s, row.steps_per_s) for row in frame.routers]
    assert routers == [(40.0, 100.0, 25.0)] * 2
    first, second = frame.workers
    assert (first.busy_share, second.busy_share) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert first.hit_share == pytest.approx(0.95)
    assert first.hit_share_ever == pytest.approx((500 + 190 * 11) / (1000 + 200 * 11))
    assert (first.host_bytes_per_s, first.disk_bytes_per_s) == (2**20, 2**10)
    totals = frame.totals
    assert (totals.tokens_in_per_s, totals.tokens_out_per_s, totals.steps_per_s) == (80.0, 200.0, 50.0)
    assert (totals.num_running, totals.num_waiting, totals.num_queued, totals.kv_share) == (8, 2, 4, 0.25)
    assert totals.traffic.rows_out_per_s == 2000.0
    assert totals.busiest_share == pytest.approx(2 / 3)
    assert frame.tokens_out_course == (200.0,) * 11
    assert len(frame.links) == 4
    assert frame.links[0].traffic.bytes_back_per_s == 4e3
    assert frame.is_settled


def test_without_routers_that_count_the_tokens_are_the_gateways() -> None:
    watch = Watch()
    seen(watch, cluster(gateway(0.0)), 0.0)
    frame = seen(watch, cluster(gateway(2.0)), 2.0)
    assert (frame.totals.tokens_in_per_s, frame.totals.tokens_out_per_s) == (40.0, 100.0)
    assert frame.totals.steps_per_s is None


def test_a_process_under_a_new_id_has_no_rate_until_it_was_heard_twice_and_others_keep_theirs() -> None:
    watch = Watch()
    seen(watch, cluster(worker(0.0), router(0.0)), 0.0)
    seen(watch, cluster(worker(1.0), router(1.0)), 1.0)
    frame = seen(watch, cluster(worker(0.0, "worker-00000000dd"), router(2.0)), 2.0)
    assert frame.workers[0].busy_share is None
    assert frame.routers[0].tokens_out_per_s == 100.0
    assert not frame.is_settled
    frame = seen(watch, cluster(worker(1.0, "worker-00000000dd"), router(3.0)), 3.0)
    assert frame.workers[0].busy_share == 0.5


def test_a_gateway_that_tells_no_times_is_measured_by_our_clock() -> None:
    watch = Watch()
    for at_s in (0.0, 2.0):
        frame = seen(watch, cluster(replace(gateway(at_s), counted_unix_ms=0, joined_unix_ms=0)), at_s)
    assert frame.gateways[0].tokens_out_per_s == 100.0
    assert frame.gateways[0].service.age_s is None


# Events.


def test_members_that_come_go_and_change_are_told() -> None:
    watch = Watch()
    first = seen(watch, cluster(worker(0.0)), 0.0)
    assert texts(first) == ["watching 2 services, placement epoch 3"]
    joined = seen(watch, cluster(worker(1.0), worker(1.0, "worker-1", state="JOINING")), 1.0)
    assert texts(joined) == ["worker-1 joined, JOINING, at 127.0.0.1:30184"]
    serving = seen(watch, cluster(worker(2.0), worker(2.0, "worker-1")), 2.0)
    assert texts(serving) == ["worker-1 JOINING -> SERVING"]
    left = seen(watch, cluster(worker(3.0, "worker-1")), 3.0)
    assert texts(left) == ["worker-00000000cc left"]
    assert texts(seen(watch, cluster(worker(4.0, "worker-1")), 4.0)) == []
    assert [event.unix_s - UNIX_S for event in left.events] == [0.0, 1.0, 2.0, 3.0]


def test_a_new_epoch_is_told_with_what_was_moved() -> None:
    watch = Watch()
    seen(watch, cluster(), 0.0)
    moved = balance(moves=15, moved_bytes=15 * 2**20)
    assert texts(seen(watch, cluster(epoch=4, balance=moved), 1.0)) == ["epoch 3 -> 4: 3 experts moved, 3.0 MiB"]
    assert texts(seen(watch, cluster(epoch=5, balance=moved), 2.0)) == ["epoch 4 -> 5"]
    anew = balance(moves=1, moved_bytes=2**20)  # a balancer that started anew counts from nothing
    assert texts(seen(watch, cluster(epoch=6, balance=anew), 3.0)) == ["epoch 5 -> 6: 1 expert moved, 1.0 MiB"]


def test_a_balancer_that_is_lost_takes_nobody_with_it() -> None:
    watch = Watch()
    seen(watch, cluster(worker(0.0), router(0.0)), 0.0)
    lost = seen(watch, cluster(stale_ms=1_500, epoch=0, balance=balance(moves=0, moved_bytes=0)), 1.0)
    assert texts(lost) == ["balancer lost; all goes on as placed"]
    assert texts(seen(watch, cluster(stale_ms=4_000, epoch=0), 2.0)) == []
    back = seen(watch, cluster(worker(5.0), router(5.0)), 5.0)
    assert texts(back) == ["balancer back after 4 s"]
    assert back.routers[0].tokens_out_per_s == 100.0


def test_redis_that_is_lost_and_back_and_a_wish_for_workers_are_told() -> None:
    watch = Watch()
    seen(watch, cluster(), 0.0)
    lost = seen(watch, cluster(balance=balance(has_memory=False)), 1.0)
    assert texts(lost) == ["the balancer does not reach Redis; it goes on from memory"]
    back = seen(watch, cluster(wanted_workers=3), 2.0)
    assert texts(back) == ["the balancer reaches Redis again", "3 workers wanted"]


def test_a_process_that_started_anew_under_its_id_is_told() -> None:
    watch = Watch()
    seen(watch, cluster(gateway(5.0)), 0.0)
    again = replace(gateway(1.0), counted_unix_ms=round((UNIX_S + 6) * 1e3))
    frame = seen(watch, cluster(again), 1.0)
    assert texts(frame) == ["gateway-00000000aa started anew"]
    assert frame.gateways[0].tokens_out_per_s is None


def test_silence_is_told_with_its_length_and_its_reason_until_there_is_an_answer() -> None:
    watch = Watch()
    frame = seen(watch, cluster(), 0.0)
    assert watch.silence("h:1", 1.0, now_s=1.5) == ""
    assert watch.silence("h:1", 1.0, now_s=4.0) == "no answer from h:1 for 4 s: still waiting"
    watch.miss("connection refused", now_s=1.0, unix_s=UNIX_S + 1)
    watch.miss("connection refused", now_s=2.0, unix_s=UNIX_S + 2)
    assert watch.silence("h:1", 1.0, now_s=3.0) == "no answer from h:1 for 3 s: connection refused"
    assert [event.text for event in watch.told(frame).events[1:]] == ["no answer from the gateway: connection refused"]
    back = seen(watch, cluster(), 4.0)
    assert texts(back)[-1] == "the gateway answers again after 4 s"
    assert watch.silence("h:1", 1.0, now_s=4.5) == ""


# Order and cuts.


def test_those_that_do_not_serve_come_first_then_the_busiest() -> None:
    frame = frame_of(num_workers=5, num_routers=2)
    ranked = busiest_workers(frame.workers)
    assert ranked[0].service.state == "JOINING"
    shares = [row.busy_share or 0.0 for row in ranked[1:]]
    assert shares == sorted(shares, reverse=True)
    assert busiest_routers(reversed(frame.routers)) == list(frame.routers)


def test_a_table_loses_columns_by_rank_and_counts_the_rows_that_it_does_not_show() -> None:
    columns = [
        Column(title="name", cells=["one", "two", "three"], side="left"),
        Column(title="much", cells=["1", "2", "3"], rank=2),
        Column(title="more", cells=["4", "5", "6"], rank=1),
    ]
    assert [made.plain.split() for made in table(columns, 80)][1] == ["one", "1", "4"]
    assert [made.plain.split() for made in table(columns, 12)][1] == ["one", "4"]
    assert [made.plain.split() for made in table(columns, 6)][1] == ["one"]
    cut = [made.plain for made in table(columns, 80, 3, more=", idle")]
    assert cut[2] == "and 2 more, idle"
    assert len(table(columns, 80, 1)) == 1


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=6))
def test_lines_that_are_shared_out_fit_and_none_gets_more_than_it_wants(room: int, asks: list[tuple[int, int]]) -> None:
    wants, leasts = [want for want, _ in asks], [least for _, least in asks]
    given_ = share_out(room, wants, leasts, [1.0] * len(asks))
    assert sum(given_) <= room
    assert all(0 <= lines <= want for lines, want in zip(given_, wants, strict=True))


def test_numbers_are_short() -> None:
    assert [number(n) for n in (None, 0.0, 1.25, 99.0, 999.7, 12_345.0, 1.5e6, 2e9, 7e13)] == [
        *("-", "0", "1.2", "99", "1.0k", "12.3k", "1.5M", "2.0G", "70T"),
    ]
    assert [size(n) for n in (None, 0.0, 1023.0, 1536.0, 20 * 2**20, 3 * 2**30)] == [
        *("-", "0 B", "1.0 KiB", "1.5 KiB", "20 MiB", "3.0 GiB"),
    ]
    assert [age(n) for n in (None, 41.0, 720.0, 8_000.0, 300_000.0)] == ["-", "41 s", "12 min", "2 h", "3 d"]
    assert [percent(n) for n in (None, 0.0, 0.004, 0.0996, 1.0)] == ["-", "0 %", "0.4 %", "10 %", "100 %"]
    assert percent(0.981, 1) == "98.1 %"
    assert (whole(None), whole(3.0)) == ("-", "3")
    assert all(len(number(10.0**at)) <= 5 and len(size(10.0**at)) <= 7 for at in range(15))
    assert (bar(0.5, 4, is_ascii=True), bar(0.5, 4, is_ascii=False)) == ("##  ", "██  ")
    assert (course((0.0, 1.0, 2.0), 2), course((), 5), course((0.0,), 5)) == ("▄█", "", " ")


# The picture.


def drawn(frame: Frame, width: int, height: int | None, **screen: object) -> list[str]:
    """Draw on a console of this size, as the command does, and give its lines."""
    lines = picture(frame, Screen(width=width, height=height, **screen), target="127.0.0.1:50051")  # type: ignore[arg-type]
    console = Console(width=width, height=height or 1000, record=True, highlight=False, file=io.StringIO())
    console.print(Group(*lines))
    found = console.export_text(styles=False).split("\n")[:-1]
    assert len(found) == len(lines)  # nothing was wrapped
    return found


@pytest.mark.parametrize("num_workers", [2, 64])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50)])
def test_a_frame_fits_its_screen_and_says_what_matters(width: int, height: int, num_workers: int) -> None:
    lines = drawn(frame_of(num_workers, 3), width, height, hint="q ends")
    assert len(lines) <= height
    assert all(cell_len(text) <= width for text in lines)
    text = "\n".join(lines)
    words = ("127.0.0.1:50051", "q ends", "placement epoch 3", f"{num_workers} workers", "out   300", "steps/s", "KV")
    words += ("running", "dispatches queued", "hits 95.0 %", "loads/s", "rows/s", "bytes/s", "busy", "SERVING")
    words += ("decode 0.70/0.90/0.85", "12 experts", "hottest", "18.1 %", "events", "watching")
    assert [word for word in words if word not in text] == []
    if num_workers == 64:
        assert "63 JOINING" not in text and "1 JOINING" in text
        first = next(at for at, text in enumerate(lines) if text.startswith("worker "))
        assert "JOINING" in lines[first + 1]
        assert any(text.startswith("and ") and "more, busy" in text for text in lines)
    if width == 160:
        assert "link from" in text


@given(st.integers(1, 220), st.integers(1, 70), st.sampled_from([0, 1, 9, 64]), st.booleans())
def test_no_screen_is_too_small(width: int, height: int, num_workers: int, is_ascii: bool) -> None:
    frame = frame_of(num_workers, 2, num_frames=2)
    screen = Screen(width=width, height=height, is_ascii=is_ascii, hint="q ends")
    lines = picture(replace(frame, stale_s=3.0), screen, target="h:1", notice="no answer\x1b[2J from h:1")
    assert len(lines) <= height
    assert all(made.cell_len <= width for made in lines)
    assert not any("\x1b" in made.plain or "\n" in made.plain for made in lines)
    assert not is_ascii or all(made.plain.isascii() for made in lines)


def test_without_a_limit_all_members_are_shown() -> None:
    text = "\n".join(drawn(frame_of(40, 2), 120, None))
    assert all(f"{at:010x}  " in text for at in range(40))


def test_what_is_lost_is_said_at_the_top() -> None:
    frame = seen(Watch(), cluster(stale_ms=3_000, balance=balance(has_memory=False)), 0.0)
    lines = picture(frame, Screen(width=80, height=24), target="h:1", notice="no answer from h:1 for 3 s: refused")
    top = [made.plain for made in lines[1:4]]
    assert top[0] == "! no answer from h:1 for 3 s: refused"
    assert "Redis" in top[1]
    assert "has not answered for 3 s" in top[2]


def test_nothing_is_said_by_colour_alone() -> None:
    lost = replace(worker(0.0), state="LOST")
    lines = picture(seen(Watch(), cluster(lost), 0.0), Screen(width=80, height=24), target="h:1")
    out = {no_color: io.StringIO() for no_color in (True, False)}
    for no_color, file in out.items():
        console = Console(width=80, no_color=no_color, force_terminal=True, color_system="standard", file=file)
        console.print(Group(*lines))
    assert "LOST" in out[True].getvalue()
    assert "\x1b[1;31m" in out[False].getvalue()
    assert "31m" not in out[True].getvalue()


def test_a_frame_of_a_cluster_at_rest_has_no_numbers_that_are_not_known() -> None:
    frame = seen(Watch(), cluster_at(0.0), 0.0)
    assert frame.totals.tokens_out_per_s is None
    assert "out     -" in "\n".join(drawn(frame, 80, 24))
