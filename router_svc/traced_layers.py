"""The spans of a step's layers: which layers get one, and those of a step that goes through its layers in one call.

Such a call sends each layer's traceparent with its dispatches and stamps when its rows went and were back; spans are
made of that when it is over, under the ids that were sent. L layers.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from opentelemetry.trace import StatusCode

from collegium.fabric import tracing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opentelemetry.trace import Span

_MAX_TRACED_DISPATCHES = 256  # of one step: a sampled request must not fill the exporter's queue
_TRACEPARENT_BYTES = 55
_NAME = "router.experts"


def is_traced(layer: int, num_traced: int, num_dispatches: int) -> bool:
    """Say whether a layer gets spans in the traced step of this number, which has so many dispatches.

    Where these are many, a part of the layers does, another part in the next traced step, until each had its turn.
    """
    return (layer + num_traced) % -(-num_dispatches // _MAX_TRACED_DISPATCHES) == 0


@contextmanager
def layer_span(traceparent: str, layer: int, num_rows: int) -> Iterator[Span]:
    """Span a layer's exchange under a step's traceparent."""
    with _ending(tracing.start_span(_NAME, traceparent=traceparent, attributes=_about(layer, num_rows))) as span:
        yield span


class TracedLayers:
    """The layers of one step that are traced.

    texts [L, 55] uint8: each layer's traceparent, zeros where it is not traced. stamps [L, 2] int64: when its rows were
    sent and were back, of the monotonic clock, the call's to write.
    """

    def __init__(self, traceparent: str, layers: Iterable[int], *, num_layers: int, num_rows: int):
        """Give spans to `layers` under a step's traceparent."""
        self._traceparent, self._num_rows = traceparent, num_rows
        self._own = {layer: tracing.reserve(traceparent) for layer in layers}
        self.texts = np.zeros((num_layers, _TRACEPARENT_BYTES), np.uint8)
        self.stamps = np.zeros((num_layers, 2), np.int64)
        for layer, own in self._own.items():
            self.texts[layer] = np.frombuffer(own.encode(), np.uint8)
        self._to_wall_ns = time.time_ns() - time.monotonic_ns()

    def tell(self, begin: int, end: int) -> None:
        """Make the spans of layers from `begin` to before `end`, which are computed."""
        for layer in range(begin, end):
            if layer in self._own:
                self._start(layer).end(self._to_wall_ns + int(self.stamps[layer, 1]))

    @contextmanager
    def finishing(self, layer: int) -> Iterator[Span | None]:
        """Span a layer that a call has left unfinished, from when its rows were sent; None where it is not traced."""
        if layer not in self._own:
            yield None
            return
        with _ending(self._start(layer)) as span:
            yield span

    def _start(self, layer: int) -> Span:
        return tracing.start_span(
            _NAME,
            traceparent=self._traceparent,
            own=self._own[layer],
            start_ns=self._to_wall_ns + int(self.stamps[layer, 0]),
            attributes=_about(layer, self._num_rows),
        )


@contextmanager
def _ending(span: Span) -> Iterator[Span]:
    try:
        yield span
    except BaseException:
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


def _about(layer: int, num_rows: int) -> dict[str, int]:
    return {"collegium.layer": layer, "collegium.rows": num_rows, "collegium.retries": 0}
