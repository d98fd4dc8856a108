"""Asking a gateway again and again, on a thread of its own.

Owns the clients and the thread. Stays with one gateway until it fails, then takes the next. Judges nothing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from collegium.client import Client, Cluster, CollegiumError, Model

_WAITING = 4  # outcomes, for a reader that is slow
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a gateway said. now_s: on the monotonic clock; unix_s: the time of day."""

    cluster: Cluster
    models: tuple[Model, ...]  # empty until a router could tell
    now_s: float
    unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A call that failed."""

    error: CollegiumError
    now_s: float
    unix_s: float


class Polls:
    """A context manager; outcomes are taken by the thread that entered it."""

    def __init__(self, clients: Mapping[str, Client], interval_s: float, on_news: Callable[[], None]) -> None:
        """Ask through these clients, by address, which become this object's. on_news: called on the other thread."""
        self._clients = list(clients.items())
        self.interval_s = interval_s
        self._on_news = on_news
        self._at = 0
        self.fault: Exception | None = None
        self._models: tuple[Model, ...] = ()
        self._outcomes: queue.Queue[Answer | Miss] = queue.Queue(_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polls", daemon=True)

    @property
    def where(self) -> str:
        """The gateway that is asked now."""
        return self._clients[self._at][0]

    def __enter__(self) -> Polls:
        """Begin to ask."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the call that is on its way, the thread and the clients."""
        self._stopping.set()
        for _, client in self._clients:
            client.close()
        self._thread.join(_JOIN_S)

    def next(self) -> Answer | Miss | None:
        """Give the oldest outcome that was not taken yet; None where there is none. Raises what ended the asking."""
        if self.fault is not None:
            raise self.fault
        try:
            return self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self.interval_s, time.monotonic())
            try:
                outcome = self._ask()
            except Exception as error:
                if self._stopping.is_set():
                    return  # the channel was closed under the call
                self.fault = error
                self._on_news()
                return
            while not self._stopping.is_set():
                try:
                    self._outcomes.put(outcome, timeout=self.interval_s)
                    break
                except queue.Full:
                    continue
            self._on_news()

    def _ask(self) -> Answer | Miss:
        _, client = self._clients[self._at]
        try:
            cluster = client.get_cluster()
        except CollegiumError as error:
            self._at = (self._at + 1) % len(self._clients)
            return Miss(error=error, now_s=time.monotonic(), unix_s=time.time())
        now_s, unix_s = time.monotonic(), time.time()
        if not self._models and any((one.role, one.state) == ("router", "SERVING") for one in cluster.members):
            with contextlib.suppress(CollegiumError):  # it is asked for again the next time
                self._models = client.list_models()
        return Answer(cluster=cluster, models=self._models, now_s=now_s, unix_s=unix_s)
