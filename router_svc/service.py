"""The router's gRPC service: describe the model, attach gateways.

Owns one outbox per attached gateway: the engine's thread fills it, the event loop drains it. A gateway that stops
reading is cut off when its outbox is full; gateways always drain their streams.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from collegium.fabric import logs
from collegium.fabric.errors import Unavailable
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc
from router_svc.engine import Engine, Load, News
from router_svc.messages import frame_of, hand_over, refusal, sequences_of

_log = logs.get("router")
_OUTBOX_FRAMES = 4096  # at one frame a step: minutes of a gateway that does not read

Frame = router_pb2.AttachResponse
Context = grpc.aio.ServicerContext


@dataclass(slots=True)
class _Attached:
    outbox: asyncio.Queue[Frame | None]
    gateway_id: str = ""
    is_cut: bool = False


class Outboxes:
    """Where the engine's news go, by owner. `deliver` is for the engine's thread, the rest for the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.on_cut: Callable[[int], None] = lambda owner: None  # told of an owner whose gateway does not read
        self._attached: dict[int, _Attached] = {}
        self._ids = itertools.count(1)

    def open(self) -> tuple[int, _Attached]:
        """Make an outbox for a new stream."""
        owner = next(self._ids)
        self._attached[owner] = _Attached(asyncio.Queue(_OUTBOX_FRAMES))
        return owner, self._attached[owner]

    def close(self, owner: int) -> None:
        """Forget an owner."""
        self._attached.pop(owner, None)

    def deliver(self, owner: int, news: list[News], load: Load, step: int) -> None:
        """Queue a frame. Thread-safe."""
        self._loop.call_soon_threadsafe(self.put, owner, frame_of(news, load, step))

    def put(self, owner: int, frame: Frame | None) -> None:
        """Queue a frame; None ends the stream."""
        attached = self._attached.get(owner)
        if attached is None or attached.is_cut:
            return
        try:
            attached.outbox.put_nowait(frame)
        except asyncio.QueueFull:
            attached.is_cut = True
            attached.outbox.get_nowait()
            attached.outbox.put_nowait(None)
            self.on_cut(owner)
            _log.warning("gateway does not read its stream and is cut off", gateway_id=attached.gateway_id)

    def end_all(self) -> None:
        """End every stream."""
        for owner in list(self._attached):
            self.put(owner, None)


class RouterService(router_pb2_grpc.RouterServicer):
    """Implements collegium.v1.Router."""

    def __init__(self, outboxes: Outboxes):
        self._outboxes = outboxes
        self._engine: Engine | None = None  # until the model is loaded
        self._model = inference_pb2.Model()
        self.router_id = ""
        self.is_draining = False

    def open(self, engine: Engine, model: inference_pb2.Model) -> None:
        """Begin to serve a loaded model."""
        self._engine, self._model = engine, model
        self._outboxes.on_cut = engine.detach

    async def Describe(self, request: router_pb2.DescribeRequest, context: Context) -> router_pb2.DescribeResponse:
        """Say which model this router runs."""
        self._ready()
        return router_pb2.DescribeResponse(router_id=self.router_id, model=self._model)

    async def Attach(
        self, request_iterator: AsyncIterator[router_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[Frame]:
        """Serve one gateway until its stream ends; its sequences end with it."""
        engine = self._ready()
        owner, attached = self._outboxes.open()
        engine.attach(owner)
        reader = asyncio.create_task(self._read(engine, owner, attached, request_iterator), name=f"attach-{owner}")
        try:
            while True:
                frame = await attached.outbox.get()
                if frame is None:
                    return
                yield frame
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            engine.detach(owner)
            self._outboxes.close(owner)
            _log.info("gateway detached", gateway_id=attached.gateway_id)

    async def _read(
        self, engine: Engine, owner: int, attached: _Attached, frames: AsyncIterator[router_pb2.AttachRequest]
    ) -> None:
        try:
            async for frame in frames:
                if frame.gateway_id and not attached.gateway_id:
                    attached.gateway_id = frame.gateway_id
                    _log.info("gateway attached", gateway_id=frame.gateway_id)
                self._take(engine, owner, frame)
        finally:
            self._outboxes.put(owner, None)

    def _ready(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the router is loading its model", reason="LOADING", retry_after_s=1.0)
        if self.is_draining or not self._engine.is_alive:
            raise Unavailable("the router is draining", reason="DRAINING", retry_after_s=1.0)
        return self._engine

    def _take(self, engine: Engine, owner: int, frame: router_pb2.AttachRequest) -> None:
        for submission in frame.submissions:
            if self.is_draining:
                self._outboxes.put(owner, hand_over(submission))
                continue
            try:
                engine.submit(sequences_of(submission, owner, self._model))
            except ValueError as error:
                self._outboxes.put(owner, refusal(submission, error))
        for ref in frame.cancellations:
            engine.cancel(owner, ref.request_id, _choice(ref))
        for ref in frame.pauses:
            engine.pause(owner, ref.request_id, _choice(ref), True)
        for ref in frame.unpauses:
            engine.pause(owner, ref.request_id, _choice(ref), False)


def _choice(ref: router_pb2.SequenceRef) -> int | None:
    return ref.choice_index if ref.HasField("choice_index") else None
