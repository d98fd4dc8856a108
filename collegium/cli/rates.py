"""How fast the counters of one process grow between two hearings of it.

Owns the names of the counters that `collegium top` reads, and the rule that no rate is negative: a process that started
anew has none until it has been heard twice. Pure: told the time, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Families: a name stands for all its series, whatever their labels.
REQUESTS = "collegium_request_success_total"  # gateway
FAILURES = "collegium_request_failure_total"
SHED = "collegium_requests_shed_total"
PROMPT_TOKENS = "collegium_prompt_tokens_total"
GENERATED_TOKENS = "collegium_generation_tokens_total"
RUNNING = "collegium_num_requests_running"  # router
WAITING = "collegium_num_requests_waiting"
KV_USE = "collegium_kv_cache_usage_perc"
PREEMPTIONS = "collegium_num_preemptions_total"
PREFILLED_TOKENS = "collegium_prefilled_tokens_total"
SAMPLED_TOKENS = "collegium_sampled_tokens_total"
STEPS = "collegium_steps_total"
RETRIES = "collegium_dispatch_retries_total"
ROUTER_ROWS = "collegium_link_rows_total"
ROUTER_BYTES = "collegium_link_bytes_total"
WORKER_ROWS = "collegium_worker_link_rows_total"  # worker
WORKER_BYTES = "collegium_worker_link_bytes_total"
DISPATCHES = "collegium_worker_dispatches_total"
QUEUED = "collegium_queued_dispatches"
EXPERT_REQUESTS = "collegium_expert_requests_total"
EXPERT_HITS = "collegium_expert_hits_total"
LOAD_BYTES = "collegium_expert_load_bytes_total"
BUSY_S = "collegium_busy_seconds_total"
STALL_S = "collegium_expert_stall_seconds_total"
MEMORY_BYTES = "collegium_expert_memory_bytes"
RESIDENT = "collegium_resident_experts"
# A router's own, by "name/worker id"; they are on no metrics page.
KV_BLOCKS = "total_kv_blocks"
LINK_ROWS_OUT, LINK_ROWS_BACK = "rows_out", "rows_back"
LINK_BYTES_OUT, LINK_BYTES_BACK = "bytes_out", "bytes_back"
LINK_DISPATCHES = "dispatches"

_LEAST_SPAN_S = 0.25  # of a rate: a change of state is told at once, and a few ms of counting say little
_FORGET_S = 10.0  # rates of a process that has been silent for longer are nobody's: a lease is 5 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The counters of a process, and when they were heard, in s by a clock that is the same for all its readings."""

    heard_s: float
    counters: Mapping[str, float]


class Meter:
    """The counters of one process, and what they gained between the last two hearings that are far enough apart."""

    def __init__(self, first: Reading, now_s: float) -> None:
        """Begin with a first reading, which makes no rate. now_s: the reader's own clock, any origin."""
        self._newest = self._base = first
        self._gains: Mapping[str, float] = {}
        self._news_s = now_s
        self._span_s = 0.0

    @property
    def has_rates(self) -> bool:
        """Whether anything can be said of rates."""
        return self._span_s > 0

    def take(self, reading: Reading, now_s: float) -> bool:
        """Take the newest reading; gives whether the process has started anew.

        The same reading again is no news, and neither is an older one: a balancer that comes back tells what it
        remembers first.
        """
        if reading.heard_s <= self._newest.heard_s:
            if now_s - self._news_s > _FORGET_S:
                self._forget()
            return False
        self._news_s = now_s
        is_anew = any(
            _is_total(key) and reading.counters.get(key, value) < value for key, value in self._newest.counters.items()
        )
        self._newest = reading
        if is_anew:
            self._base = reading
            self._forget()
        elif reading.heard_s - self._base.heard_s >= _LEAST_SPAN_S:
            self._gains = _gains(self._base.counters, reading.counters)
            self._span_s = reading.heard_s - self._base.heard_s
            self._base = reading
        return is_anew

    def level(self, name: str) -> float | None:
        """Give what a family stands at now, its series added up; None where the process does not count it."""
        return _sum_of(self._newest.counters, name)

    def gain(self, name: str) -> float | None:
        """Give what a family, or one series, gained between the last two hearings; None where that is not known."""
        return _sum_of(self._gains, name) if self.has_rates else None

    def rate(self, name: str) -> float | None:
        """Give the gain per second."""
        gained = self.gain(name)
        return None if gained is None else gained / self._span_s

    def peers(self, name: str) -> list[str]:
        """List the workers that a router counts `name` by."""
        prefix = f"{name}/"
        return sorted(key.removeprefix(prefix) for key in self._newest.counters if key.startswith(prefix))

    def _forget(self) -> None:
        self._gains, self._span_s = {}, 0.0


def add(*values: float | None) -> float | None:
    """Add up what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Divide; None where either is not known or there is no whole."""
    return part / whole if part is not None and whole else None


def _is_total(key: str) -> bool:
    return key.partition("{")[0].endswith("_total")


def _gains(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """A series that was not there began at 0; a link that was opened anew counts from 0 too, and has no gain yet."""
    return {key: value - before.get(key, 0.0) for key, value in after.items() if value >= before.get(key, 0.0)}


def _sum_of(counters: Mapping[str, float], name: str) -> float | None:
    if name in counters:
        return counters[name]
    return add(*(value for key, value in counters.items() if key.startswith(f"{name}{{")))
