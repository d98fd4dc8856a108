"""A frame of `collegium top` as lines of text for a screen of a given size.

Owns what is shown where, and what is left out first where there is little room. Nothing is said by colour alone. Pure:
a frame in, lines out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from collegium.cli.columns import (
    age,
    beside,
    course,
    line,
    natural_width,
    number,
    percent,
    pieces,
    printable,
    share_out,
    size,
    table,
    whole,
    wrapped,
)
from collegium.cli.panels import (
    hottest_line,
    hottest_lines,
    least_busy,
    link_columns,
    router_columns,
    service_columns,
    worker_columns,
)
from collegium.cli.rows import SERVING, busiest_links, busiest_routers, busiest_workers
from collegium.cli.watching import Frame, count

_TWO_COLUMNS = 132  # characters from which tables and events stand beside each other
_RIGHT = 52  # characters that the right one needs at least
_TALL = 40  # lines from which there is room for what few look for
_LINK_LINES = 9
_EVENTS = 24
_ALARM = "bold red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Where a frame is drawn. height: lines; None: as many as it takes."""

    width: int
    height: int | None
    is_ascii: bool = False
    hint: str = ""  # which keys there are


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Lines that can be fewer than they want to be. rank: blocks of the lowest get their least first."""

    draw: Callable[[int], list[Text]]  # of at most so many lines
    want: int
    least: int
    rank: int
    weight: float = 1.0


def picture(frame: Frame, screen: Screen, *, target: str, notice: str = "") -> list[Text]:
    """Draw a frame: at most screen.height lines of at most screen.width characters. notice: an alarm, in words."""
    width = screen.width
    top = [_title(frame, screen, target)]
    if notice:
        top.append(line(f"! {' '.join(notice.split())}", width, _ALARM))
    if frame.balance.last_decision and not frame.balance.has_memory:
        top.append(line("! the balancer does not reach Redis; it goes on from memory", width, _ALARM))
    if frame.stale_s:
        text = f"! the balancer has not answered for {frame.stale_s:.0f} s; this is what it said before"
        top.append(line(text, width, _ALARM))
    top += _totals(frame, screen)
    if screen.height is None or screen.height >= _TALL:
        top.append(line("", 0))
    room = None if screen.height is None else max(0, screen.height - len(top))
    if width < _TWO_COLUMNS:
        lines = _stack([*_tables(frame, screen, width), *_tellings(frame, screen, width)], room)
    else:
        natural = max(
            map(natural_width, (router_columns(frame.routers), worker_columns(frame.workers, is_ascii=screen.is_ascii)))
        )
        left = min(max(natural, width - 2 * _RIGHT), width - _RIGHT - 2)
        right = width - left - 2
        lines = beside(
            _stack(_tables(frame, screen, left), room),
            _stack(_tellings(frame, screen, right, is_tall=True), room),
            left,
        )
    drawn = [*top, *lines][: screen.height]
    for made in drawn:
        made.end = "\n"
        if screen.is_ascii:
            made.plain = made.plain.encode("ascii", "replace").decode()
    return drawn


def _stack(blocks: Sequence[_Block], room: int | None) -> list[Text]:
    """Put blocks below each other, with a blank line between where there is room for all."""
    shown = [block for block in blocks if block.want]
    num_lines = sum(block.want for block in shown)
    if room is None or num_lines + len(shown) - 1 <= room:
        lines: list[Text] = []
        for block in shown:
            lines += [*([line("", 0)] if lines else []), *block.draw(block.want)]
        return lines
    order = sorted(range(len(shown)), key=lambda at: shown[at].rank)
    shares = share_out(
        room,
        [shown[at].want for at in order],
        [shown[at].least for at in order],
        [shown[at].weight for at in order],
    )
    given = dict(zip(order, shares, strict=True))
    return [made for at, block in enumerate(shown) if given[at] for made in block.draw(given[at])]


def _title(frame: Frame, screen: Screen, target: str) -> Text:
    models = ", ".join(
        f"{model.name} ({model.architecture}, {model.dtype}): {model.num_moe_layers} x {model.num_experts} experts, "
        f"top {model.top_k}"
        for model in frame.models
    )
    clock = _clock(frame.unix_s)
    end = f"  {screen.hint}  {clock}" if screen.hint else f"  {clock}"
    room = max(0, screen.width - len(end))
    made = line(printable(f"collegium top  {target}  {models}").rstrip(), room, "bold")
    made.append(" " * (room - made.cell_len))
    made.append(end, "not bold")
    made.truncate(screen.width)
    return made


def _totals(frame: Frame, screen: Screen) -> list[Text]:
    totals, width = frame.totals, screen.width
    tokens = [f"in {number(totals.tokens_in_per_s):>5}   out {number(totals.tokens_out_per_s):>5}"]
    tokens += [f"steps/s {number(totals.steps_per_s)}"]
    requests = f"requests/s {number(totals.requests_per_s)}"
    requests += f", {number(totals.failures_per_s)} failed" if totals.failures_per_s else ""
    requests += f", {number(totals.shed_per_s)} refused" if totals.shed_per_s else ""
    tokens.append(requests)
    if not screen.is_ascii:
        used = pieces("tokens/s", tokens, width).cell_len + 3
        tokens.append(course(frame.tokens_out_course, min(60, width - used)))
    queues = [
        f"{whole(totals.num_running)} running, {whole(totals.num_waiting)} waiting",
        f"KV in use {percent(totals.kv_share)}",
        f"dispatches queued {whole(totals.num_queued)}",
    ]
    queues += [f"preemptions/s {number(totals.preemptions_per_s)}"] if totals.preemptions_per_s else []
    queues += [f"dispatches sent again/s {number(totals.retries_per_s)}"] if totals.retries_per_s else []
    experts = [
        f"hits {percent(totals.hit_share, 1)}, {percent(totals.hit_share_ever, 1)} since start",
        f"loads/s {size(totals.host_bytes_per_s)} host, {size(totals.disk_bytes_per_s)} disk",
        f"busy {percent(totals.busy_share)} mean, {percent(totals.busiest_share)} most",
    ]
    traffic = totals.traffic
    links = [
        f"rows/s {number(traffic.rows_out_per_s)} out, {number(traffic.rows_back_per_s)} back",
        f"bytes/s {size(traffic.bytes_out_per_s)} out, {size(traffic.bytes_back_per_s)} back",
    ]
    rows = (
        ("cluster", _census(frame)),
        ("tokens/s", tokens),
        ("sequences", queues),
        ("experts", experts),
        ("links", links),
    )
    return [pieces(label, parts, width) for label, parts in rows]


def _census(frame: Frame) -> list[str]:
    """Say how many there are of each, and of those that do not serve, how far they are."""
    parts = [f"placement epoch {frame.placement_epoch}"]
    for role in ("worker", "router", "gateway", "balancer"):
        states = Counter(service.state for service in frame.services if service.role == role)
        if not states and role != "worker":
            continue
        odd = [f"{number} {state}" for state, number in sorted(states.items()) if state != SERVING]
        wanted = frame.wanted_workers if role == "worker" else 0
        odd += [f"{wanted} wanted"] if wanted and wanted != states.total() else []
        parts.append(count(states.total(), role) + (f" ({', '.join(odd)})" if odd else ""))
    return parts


def _tables(frame: Frame, screen: Screen, width: int) -> list[_Block]:
    """Lay out routers, workers and links: the busiest where not all fit, else by id."""

    def routers(limit: int) -> list[Text]:
        rows = frame.routers if len(frame.routers) < limit else busiest_routers(frame.routers)
        return table(router_columns(rows), width, limit)

    def workers(limit: int) -> list[Text]:
        rows = frame.workers if len(frame.workers) < limit else busiest_workers(frame.workers)
        hidden = rows[max(0, limit - 2) :]
        return table(worker_columns(rows, is_ascii=screen.is_ascii), width, limit, more=least_busy(hidden))

    def links(limit: int) -> list[Text]:
        rows = frame.links if len(frame.links) < limit else busiest_links(frame.links)
        return table(link_columns(rows), width, limit)

    has_room = screen.height is None or screen.height >= _TALL
    num_links = min(1 + len(frame.links), _LINK_LINES) if has_room and frame.links else 0
    num_routers, num_workers = (1 + len(rows) if rows else 0 for rows in (frame.routers, frame.workers))
    return [
        _Block(draw=routers, want=num_routers, least=min(4, num_routers), rank=0),
        _Block(draw=workers, want=num_workers, least=min(4, num_workers), rank=0, weight=3.0),
        _Block(draw=links, want=num_links, least=min(3, num_links), rank=5, weight=0.5),
    ]


def _tellings(frame: Frame, screen: Screen, width: int, *, is_tall: bool = False) -> list[_Block]:
    """Lay out gateways and balancer, the balance, the hottest experts, and what happened."""
    others = [service for role in ("gateway", "balancer") for service in frame.services if service.role == role]
    balance = _balance(frame, width, is_tall=is_tall)
    hottest = hottest_lines(frame, width, is_ascii=screen.is_ascii) if is_tall else hottest_line(frame, width)
    newest = frame.events[-_EVENTS:]
    told = [made for event in newest for made in wrapped(_clock(event.unix_s), _one_line(event.text), width, 2)]

    def services(limit: int) -> list[Text]:
        return table(service_columns(others, frame.gateways), width, limit)

    def events(limit: int) -> list[Text]:
        return [line("events".ljust(width), width, "bold reverse"), *(told[-(limit - 1) :] if limit > 1 else ())]

    return [
        _Block(draw=services, want=1 + len(others), least=min(3, 1 + len(others)), rank=2),
        _Block(draw=lambda limit: balance[:limit], want=len(balance), least=min(2, len(balance)), rank=3),
        _Block(draw=lambda limit: hottest[:limit], want=len(hottest), least=min(1, len(hottest)), rank=4, weight=2.0),
        _Block(draw=events, want=1 + len(told), least=min(3, 1 + len(told)), rank=1, weight=2.0),
    ]


def _balance(frame: Frame, width: int, *, is_tall: bool) -> list[Text]:
    """Say how even the load is, what was moved, and why nothing is. is_tall: there are more lines than columns."""
    balance = frame.balance
    phases = [
        f"{name} {even.min:.2f}/{even.p50:.2f}/{even.mean:.2f}"
        for name, even in (("decode", balance.decode), ("prefill", balance.prefill))
        if even.mean
    ]
    key = "least/median/mean"
    lines: list[Text] = []
    if phases and is_tall:
        lines += [pieces("balanced", [phases[0], key], width)]
        lines += [pieces("", [phase], width) for phase in phases[1:]]
    elif phases:
        lines.append(pieces("balanced", [*phases, key], width))
    if balance.moves:
        parts = [
            f"{count(balance.moves, 'expert')}, {size(balance.moved_bytes)} in all",
            f"the last {age(balance.since_plan_ms / 1e3)} ago",
        ]
        lines.append(pieces("moves", parts, width))
    if balance.last_decision:
        lines += wrapped("last look", _one_line(balance.last_decision), width, 3 if is_tall else 1)
    return lines


def _clock(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))


def _one_line(text: str) -> str:
    return " ".join(text.split())
