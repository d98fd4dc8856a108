"""The tables of `collegium top`: which numbers of a member are columns, and which of them go first for lack of room.

Owns titles, order and ranks. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from collegium.cli.columns import Column, age, bar, number, percent, pieces, size, table, whole
from collegium.cli.rows import SERVING, Gateway, Link, Router, Service, Traffic, Worker
from collegium.cli.watching import Frame

_BAR = 10
_LOST = "bold red"
_NOTABLE = "bold"


def router_columns(rows: Sequence[Router]) -> list[Column]:
    """Lay routers out."""
    return [
        *_member_columns("router", [row.service for row in rows], rank=5),
        Column(title="run", cells=[whole(row.num_running) for row in rows]),
        Column(title="wait", cells=[whole(row.num_waiting) for row in rows]),
        _share("KV", [row.kv_share for row in rows]),
        _rate("tok in", [row.tokens_in_per_s for row in rows]),
        _rate("out", [row.tokens_out_per_s for row in rows]),
        _rate("steps/s", [row.steps_per_s for row in rows], rank=1),
        *_traffic_columns([row.traffic for row in rows], 2),
    ]


def worker_columns(rows: Sequence[Worker], *, is_ascii: bool) -> list[Column]:
    """Lay workers out."""
    bars = [bar(row.busy_share, _BAR, is_ascii=is_ascii) for row in rows]
    return [
        *_member_columns("worker", [row.service for row in rows], rank=9),
        _share("busy", [row.busy_share for row in rows]),
        Column(title="", cells=bars, rank=13, side="left"),
        _share("stall", [row.stall_share for row in rows], rank=7),
        Column(title="queue", cells=[whole(row.num_queued) for row in rows], rank=1),
        Column(title="hits", cells=[percent(row.hit_share, 1) for row in rows], rank=1, least=7),
        Column(title="ever", cells=[percent(row.hit_share_ever, 1) for row in rows], rank=5, least=7),
        *_traffic_columns([row.traffic for row in rows], 2),
        _size("host/s", [row.host_bytes_per_s for row in rows], rank=6),
        _size("disk/s", [row.disk_bytes_per_s for row in rows], rank=6),
        Column(title="homes", cells=[str(row.num_homes) for row in rows], rank=12),
        Column(title="in slots", cells=[whole(row.num_resident) for row in rows], rank=12),
        _size("of", [row.memory_bytes or None for row in rows], rank=12),
    ]


def link_columns(rows: Sequence[Link]) -> list[Column]:
    """Lay links out."""
    return [
        Column(title="link from", cells=[_short(row.router_id) for row in rows], side="left", least=10),
        Column(title="to", cells=[_short(row.worker_id) for row in rows], side="left", least=10),
        _rate("disp/s", [row.dispatches_per_s for row in rows], rank=9),
        *_traffic_columns([row.traffic for row in rows], 0),
    ]


def service_columns(services: Sequence[Service], gateways: Sequence[Gateway]) -> list[Column]:
    """Lay gateways out, and what else there is beside routers and workers."""
    counted = {row.service.member_id: row for row in gateways}
    rows = [counted.get(service.member_id) for service in services]

    def rates(title: str, value: Callable[[Gateway], float | None], rank: int) -> Column:
        cells = ["" if row is None else number(value(row)) for row in rows]
        return Column(title=title, cells=cells, rank=rank, least=5)

    return [
        Column(title="service", cells=[service.member_id for service in services], side="left"),
        Column(title="state", cells=[_state(service.state) for service in services], side="left", least=8),
        Column(title="age", cells=[age(one.age_s) if one.age_s else "" for one in services], rank=2, least=7),
        rates("req/s", lambda row: row.requests_per_s, 0),
        rates("failed", lambda row: row.failures_per_s, 3),
        rates("refused", lambda row: row.shed_per_s, 4),
        rates("tok in", lambda row: row.tokens_in_per_s, 1),
        rates("out", lambda row: row.tokens_out_per_s, 1),
        Column(title="address", cells=[service.address for service in services], rank=5, side="left"),
    ]


def hottest_line(frame: Frame, width: int) -> list[Text]:
    """Name the hottest experts in one line, or in none."""
    hot = _hot(frame)
    times = [_times_even(frame, share) for _, _, share in hot]
    parts = [
        f"L{layer} E{expert} {percent(share, 1)}" + (f" ({even}x)" if even else "")
        for (layer, expert, share), even in zip(hot, times, strict=True)
    ]
    return [pieces("hottest", parts, width)] if parts else []


def hottest_lines(frame: Frame, width: int, *, is_ascii: bool) -> list[Text]:
    """Name the hottest experts in a table, or not at all."""
    hot = _hot(frame)
    top = max((share for _, _, share in hot), default=0.0)
    bars = [bar(share / top if top else 0.0, _BAR, is_ascii=is_ascii) for _, _, share in hot]
    columns = [
        Column(title="hottest", cells=[f"layer {layer} expert {expert}" for layer, expert, _ in hot], side="left"),
        Column(title="share", cells=[percent(share, 1) for _, _, share in hot], least=7),
        Column(title="x even", cells=[_times_even(frame, share) or "-" for _, _, share in hot], rank=1),
        Column(title="", cells=bars, rank=2, side="left"),
    ]
    return table(columns, width) if hot else []


def _hot(frame: Frame) -> list[tuple[int, int, float]]:
    return [one for one in frame.balance.hottest if one[2] > 0]


def _times_even(frame: Frame, share: float) -> str:
    """Say how many times what it would be if all experts of the layer were asked for as often."""
    num_experts = frame.models[0].num_experts if len(frame.models) == 1 else 0
    return f"{share * num_experts:.1f}" if num_experts else ""


def least_busy(hidden: Sequence[Worker]) -> str:
    """Say how busy the workers are that are not shown."""
    shares = [row.busy_share for row in hidden if row.busy_share is not None]
    return f", busy {percent(min(shares))} to {percent(max(shares))}" if shares else ""


def _short(member_id: str) -> str:
    """Leave the role out of an id: the column says it."""
    return member_id.partition("-")[2] or member_id


def _state(state: str) -> Text:
    return Text(state, style="" if state == SERVING else _LOST if state == "LOST" else _NOTABLE)


def _member_columns(title: str, services: Sequence[Service], rank: int) -> list[Column]:
    return [
        Column(title=title, cells=[_short(service.member_id) for service in services], side="left", least=10),
        Column(title="state", cells=[_state(service.state) for service in services], side="left", least=8),
        Column(title="age", cells=[age(service.age_s) for service in services], rank=rank, least=7),
        Column(title="thr", cells=[str(service.num_threads or "-") for service in services], rank=rank + 2),
    ]


def _traffic_columns(rows: Sequence[Traffic], rank: int) -> list[Column]:
    """Rows that go back are as many as those that went out, but for those that are away: they go first."""
    return [
        _rate("rows/s", [row.rows_out_per_s for row in rows], rank=rank + 1),
        _rate("back", [row.rows_back_per_s for row in rows], rank=rank + 8),
        _size("B/s out", [row.bytes_out_per_s for row in rows], rank=rank),
        _size("back", [row.bytes_back_per_s for row in rows], rank=rank),
    ]


def _rate(title: str, values: Sequence[float | None], rank: int = 0) -> Column:
    return Column(title=title, cells=list(map(number, values)), rank=rank, least=5)


def _share(title: str, values: Sequence[float | None], rank: int = 0) -> Column:
    return Column(title=title, cells=list(map(percent, values)), rank=rank, least=5)


def _size(title: str, values: Sequence[float | None], rank: int = 0) -> Column:
    return Column(title=title, cells=list(map(size, values)), rank=rank, least=7)
