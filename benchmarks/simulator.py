"""A cluster on paper: routers and workers as queues, with costs that were measured. Pure: no clock, no process.

Each router decodes its rows step by step, layer by layer: its own time, then a dispatch to every worker that has any of
the chosen experts, then it waits for all. A worker serves one batch at a time, the oldest layer first and all that wait
for it together, as the real one does. Processes may share cores, as on one machine, or have one each.
T rows of a router, E experts, K top-k, L layers, W workers.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds. Each line is a process's own time; `link` passes without anybody's."""

    layer: float  # a router's, per layer
    layer_row: float  # and for each row
    dispatch: float  # for each worker that gets rows
    batch: float  # a worker's, per batch
    expert: float  # and for each expert in it
    pair: float  # and for each row of an expert
    link: float  # there and back together
    step: float  # a router's, per step: sampling, news
    step_row: float
    token: float  # gateway and client, per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is simulated; `cores` 0: one for each process. `skew`: spread of the experts' popularity (log-normal)."""

    routers: int
    workers: int
    rows: int
    layers: int
    experts: int
    top_k: int
    cores: int = 0
    skew: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulation found. Utilisation: share of the time that the busiest worker, and the mean one, computed."""

    tokens_per_s: float
    step_ms: float
    rows_per_call: float
    busiest: float
    mean_busy: float

    def process_ms(self, shape: Shape) -> float:
        """Give the cost of a token: milliseconds of one process (and its core or GPU), waiting included."""
        return 1e3 * (shape.routers + shape.workers) / self.tokens_per_s


class _Clock:
    """Events in their order, and cores that tasks wait for."""

    def __init__(self, cores: int) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._free = cores or 1 << 30
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), then))

    def work(self, seconds: float, then: Callable[[], None]) -> None:
        """Take a core for so long, as soon as there is one."""
        if not self._free:
            self._waiting.append((seconds, then))
            return
        self._free -= 1

        def done() -> None:
            self._free += 1
            if self._waiting:
                self.work(*self._waiting.popleft())
            then()

        self.after(seconds, done)

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.now, _, then = heapq.heappop(self._events)
            then()


@dataclass(slots=True)
class _Worker:
    queue: list[tuple[int, NDArray[np.int64], NDArray[np.int64], Callable[[], None]]] = field(default_factory=list)
    is_busy: bool = False
    busy_s: float = 0.0
    calls: int = 0
    pairs: int = 0


def simulate(costs: Costs, shape: Shape, *, num_steps: int = 20, seed: int = 0) -> Outcome:
    """Let every router decode `num_steps` steps. Deterministic for equal arguments."""
    rng = np.random.default_rng(seed)
    clock = _Clock(shape.cores)
    popularity = shape.skew * rng.standard_normal((shape.layers, shape.experts))
    home = np.stack([_homes(popularity[layer], shape.workers) for layer in range(shape.layers)])  # [L, E]
    workers = [_Worker() for _ in range(shape.workers)]
    steps_left = [num_steps] * shape.routers

    def serve(worker: _Worker) -> None:
        if worker.is_busy or not worker.queue:
            return
        layer = worker.queue[0][0]
        batch = [one for one in worker.queue if one[0] == layer]
        worker.queue = [one for one in worker.queue if one[0] != layer]
        num_experts = len(np.unique(np.concatenate([experts for _, experts, _, _ in batch])))
        num_pairs = int(sum(counts.sum() for _, _, counts, _ in batch))
        seconds = costs.batch + costs.expert * num_experts + costs.pair * num_pairs
        worker.is_busy = True
        worker.calls, worker.pairs = worker.calls + num_experts, worker.pairs + num_pairs

        def done() -> None:
            worker.is_busy, worker.busy_s = False, worker.busy_s + seconds
            for _, _, _, reply in batch:
                clock.after(costs.link / 2, reply)
            serve(worker)

        clock.work(seconds, done)

    def begin_layer(router: int, layer: int) -> None:
        if layer == shape.layers:
            clock.work(costs.step + costs.step_row * shape.rows, lambda: end_step(router))
            if costs.token:
                clock.work(costs.token * shape.rows, lambda: None)
            return
        scores = popularity[layer] + rng.gumbel(size=(shape.rows, shape.experts))
        ids = np.argpartition(-scores, shape.top_k - 1, axis=1)[:, : shape.top_k]
        counts = np.bincount(ids.ravel(), minlength=shape.experts)
        active = np.flatnonzero(counts)
        asked = np.unique(home[layer, active])
        waiting = len(asked)

        def answered() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                begin_layer(router, layer + 1)

        def send() -> None:
            for w in asked.tolist():
                mine = active[home[layer, active] == w]
                item = (layer, mine, counts[mine], answered)

                def arrive(w: int = w, item: object = item) -> None:
                    workers[w].queue.append(item)  # type: ignore[arg-type]
                    serve(workers[w])

                clock.after(costs.link / 2, arrive)

        clock.work(costs.layer + costs.layer_row * shape.rows + costs.dispatch * waiting, send)

    def end_step(router: int) -> None:
        steps_left[router] -= 1
        if steps_left[router] > 0:
            begin_layer(router, 0)

    for router in range(shape.routers):  # out of step with each other
        clock.after(router * costs.layer / shape.routers, lambda router=router: begin_layer(router, 0))
    clock.run(lambda: all(left <= 0 for left in steps_left))
    tokens = shape.routers * shape.rows * num_steps
    busy = [worker.busy_s / clock.now for worker in workers]
    return Outcome(
        tokens_per_s=tokens / clock.now,
        step_ms=1e3 * clock.now / num_steps,
        rows_per_call=sum(w.pairs for w in workers) / max(1, sum(w.calls for w in workers)),
        busiest=max(busy),
        mean_busy=sum(busy) / len(busy),
    )


def _homes(popularity: NDArray[np.float64], num_workers: int) -> NDArray[np.int64]:
    """Seat experts by falling popularity, each on the worker with the least of those that have room: [E]."""
    weights = np.exp(popularity)
    room = -(-len(weights) // num_workers)
    work, used = np.zeros(num_workers), np.zeros(num_workers, np.int64)
    home = np.zeros(len(weights), np.int64)
    for expert in np.argsort(-weights, kind="stable").tolist():
        worker = int(np.where(used < room, work, np.inf).argmin())
        home[expert] = worker
        work[worker] += weights[expert]
        used[worker] += 1
    return home
