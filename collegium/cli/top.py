"""`collegium top`: a cluster live in a terminal, or as lines of JSON.

Owns the command: options, the loop of frames, the screen. The arithmetic is in `watching`, the drawing in `picture`,
the asking in `polls`, keys and signals in `attention`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, cast

import typer
from rich.console import Console, Group
from rich.live import Live

from collegium.cli import target as t
from collegium.cli.attention import Attention, keys_of
from collegium.cli.picture import Screen, picture
from collegium.cli.polls import Answer, Miss, Polls
from collegium.cli.watching import Event, Frame, Watch
from collegium.client import CollegiumError, RetryPolicy

_CALL_S = 10.0
_POLL_S = 3.0  # for a call that comes again anyway
_SETTLE_S = 5.0  # the longest wait for a second hearing of every process: leases of 5 s are renewed three times in one
_REDRAW_S = 1.0  # also where nothing came: what is said of silence counts seconds
_PLAIN_WIDTH = 120  # where the output is no terminal, as for `status`


def top(
    target: t.Target = t.DEFAULT_TARGET,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Time between two looks, in s.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and end; so it is where stdout is no terminal.")
    ] = False,
    iterations: Annotated[int, typer.Option("--iterations", min=0, help="End after so many frames; 0: no limit.")] = 0,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout each interval.")] = False,
) -> None:
    """Watch a cluster live: queues, tokens/s, links, experts and their moves, until q or Ctrl-C."""
    with t.open_client(target, api_key, tls, tls_ca, _CALL_S) as client:
        addresses = client.targets
        client.get_cluster()  # what is wrong from the start is told as `status` tells it
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    is_live = sys.stdout.isatty() and not (console.is_dumb_terminal or once or json)
    clients = {name: t.open_client(name, api_key, tls, tls_ca, _POLL_S, RetryPolicy(rounds=1)) for name in addresses}
    with Attention() as attention, Polls(clients, interval, attention.wake) as polls:
        if is_live:
            _run_screen(console, polls, attention, iterations)
        elif json:
            _print_objects(polls, attention, 1 if once else iterations)
        else:
            _print_frames(console, polls, attention, 1 if once else iterations or 1)


class _Watching:
    """A watch over polls: takes what has come."""

    def __init__(self, polls: Polls) -> None:
        self._polls, self._watch = polls, Watch()
        self._began_s = time.monotonic()
        self.frame: Frame | None = None
        self.error: CollegiumError | None = None  # what the last call failed with
        self.num_frames = 0

    @property
    def is_ready(self) -> bool:
        """Whether there are rates of every process, as far as one waits for them."""
        is_late = time.monotonic() - self._began_s > _SETTLE_S
        return self.frame is not None and self.num_frames > 1 and (self.frame.is_settled or is_late)

    @property
    def notice(self) -> str:
        """What is wrong now."""
        return self._watch.silence(self._polls.where, self._polls.interval_s, now_s=time.monotonic())

    def take_next(self) -> bool:
        """Take the next outcome of a poll; gives whether there was one."""
        outcome = self._polls.next()
        self.error = outcome.error if isinstance(outcome, Miss) else None
        if isinstance(outcome, Answer):
            self.frame = self._watch.take(outcome.cluster, outcome.models, now_s=outcome.now_s, unix_s=outcome.unix_s)
            self.num_frames += 1
        elif outcome is not None:
            self._watch.miss(outcome.error.message, now_s=outcome.now_s, unix_s=outcome.unix_s)
            if self.frame is not None:
                self.frame = self._watch.told(self.frame)
        return outcome is not None


def _run_screen(console: Console, polls: Polls, attention: Attention, iterations: int) -> None:
    watching = _Watching(polls)
    with (
        keys_of(sys.stdin) as keys,
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live,
    ):
        while not attention.is_over and not (iterations and watching.num_frames >= iterations):
            while watching.take_next():
                pass
            if watching.frame is not None:
                width, height = console.size
                hint = "" if keys is None else "q ends"
                screen = Screen(width=width, height=height, is_ascii=_is_ascii(console), hint=hint)
                lines = picture(watching.frame, screen, target=polls.where, notice=watching.notice)
                live.update(Group(*lines), refresh=True)
            attention.wait(_REDRAW_S, keys)


def _print_frames(console: Console, polls: Polls, attention: Attention, num_frames: int) -> None:
    watching = _Watching(polls)
    while num_frames and not attention.is_over:
        if not watching.take_next():
            attention.wait(_REDRAW_S)
        elif watching.error is not None:
            raise watching.error  # there is nobody who looks at a frame that is not there
        elif watching.is_ready and watching.frame is not None:
            screen = Screen(width=console.width, height=None, is_ascii=_is_ascii(console))
            lines = picture(watching.frame, screen, target=polls.where, notice=watching.notice)
            console.print(Group(*lines))
            num_frames -= 1


def _print_objects(polls: Polls, attention: Attention, iterations: int) -> None:
    watching = _Watching(polls)
    num_printed = 0
    events: tuple[Event, ...] = ()  # of frames that were not printed
    while not attention.is_over and not (iterations and num_printed >= iterations):
        if not watching.take_next():
            attention.wait(_REDRAW_S)
            continue
        if watching.frame is not None and not watching.notice:
            events += watching.frame.new_events
        if watching.notice or (watching.is_ready and watching.frame is not None):
            frame = None if watching.frame is None else replace(watching.frame, new_events=events)
            t.print_json(_as_json(frame, polls.where, watching.notice))
            num_printed += 1
            events = events if watching.notice else ()


def _as_json(frame: Frame | None, target: str, notice: str) -> t.Json:
    if notice or frame is None:
        return {"unix_s": time.time(), "target": target, "error": notice}
    value = cast("dict[str, t.Json]", asdict(frame))
    for kind in ("gateways", "routers", "workers", "links"):
        value[kind] = [_flat(row) for row in cast("tuple[Mapping[str, t.Json]]", value[kind])]
    value["totals"] = _flat(cast("Mapping[str, t.Json]", value["totals"]))
    value["events"] = value.pop("new_events")
    value["models"] = [model.name for model in frame.models]
    del value["tokens_out_course"], value["is_settled"], value["unix_s"]
    return {"unix_s": frame.unix_s, "target": target, "error": None, **value}


def _flat(row: Mapping[str, t.Json]) -> t.Json:
    """Put the fields of what a row is made of beside its own."""
    flat: dict[str, t.Json] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update(cast("Mapping[str, t.Json]", value))
        else:
            flat[key] = value
    return flat


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
