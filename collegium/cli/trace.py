"""`collegium trace`: record which experts the gates of running routers choose, for `collegium replay`.

Owns the joining of several routers' streams into one file: sequences numbered anew, in order of appearance. Changes
nothing for the requests that it watches; without any, it waits.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, TextIO

import grpc
import typer

from collegium.buffering.traces import DECODE, PREFILL, TraceWriter
from collegium.cli import target as t
from collegium.fabric.channels import blocking_channel, split_address
from collegium.fabric.errors import CollegiumError, FailedPrecondition, SettingsError, Unavailable, from_rpc_error
from collegium.fabric.signals import heeded
from collegium.v1 import router_pb2, router_pb2_grpc

_CALL_S = 10.0
_WAITING_MESSAGES = 64  # between the routers' streams and the file
_PROGRESS_S = 0.5


def trace(
    out: Annotated[Path, typer.Argument(help="CSV file to write; one that exists is replaced.")],
    target: t.Target = t.DEFAULT_TARGET,
    router: Annotated[
        list[str] | None, typer.Option("--router", help="Control address of a router; absent: all behind the gateway.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="End after so many tokens; 0: no limit.")] = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="End after so long; 0: no limit.")] = 0.0,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
) -> None:
    """Record the experts that running requests wake, until Ctrl-C, SIGTERM or a limit.

    Tokens are counted that decoders compute. An encoder's rows are recorded where a source is encoded: one that is kept
    from an earlier request is not encoded again. Of a search by beams the best beam is recorded.
    """
    addresses = router or _find_routers(target, api_key, tls, tls_ca)
    for address in addresses:
        split_address(address, "--router")
    deadline_s = time.monotonic() + seconds if seconds else None
    try:
        file = out.open("w", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{out} cannot be written: {error.strerror}") from None
    sys.stderr.write(f"recording what {len(addresses)} router(s) choose; Ctrl-C ends it and keeps what is there\n")
    is_interrupted = _on_interrupt()
    with file, Streams(addresses, tokens) as streams:
        recording = Recording(file)
        try:
            for index, message in streams.messages(deadline_s, is_interrupted):
                recording.take(index, message)
                if tokens and recording.num_tokens >= tokens:
                    break
                recording.show(is_last=False)
        finally:
            recording.show(is_last=True)


def _on_interrupt() -> threading.Event:
    """Have the first Ctrl-C, SIGTERM or SIGHUP, the way to end a recording, set what is returned; the second one kills.

    A flag, and not KeyboardInterrupt: that could come up in a callback where nobody hears of it.
    """
    is_set = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        is_set.set()

    if threading.current_thread() is threading.main_thread():
        for number in heeded():
            signal.signal(number, on_signal)
    return is_set


class Streams:
    """One stream per router, read by a thread each; a context manager that ends them."""

    def __init__(self, addresses: Sequence[str], num_tokens: int) -> None:
        """Open nothing yet. num_tokens: asked of each router; 0: no limit."""
        self._addresses, self._num_tokens = addresses, num_tokens
        self._arrived: queue.Queue[tuple[int, router_pb2.TraceResponse | CollegiumError | None]]
        self._arrived = queue.Queue(_WAITING_MESSAGES)
        self._channels: list[grpc.Channel] = []
        self._is_closed = threading.Event()

    def __enter__(self) -> Streams:
        """Open the streams."""
        for index, address in enumerate(self._addresses):
            channel = blocking_channel(address)
            self._channels.append(channel)
            threading.Thread(target=self._read, args=(index, channel), name=f"trace-{address}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the streams."""
        self._is_closed.set()
        for channel in self._channels:
            channel.close()

    def messages(
        self, deadline_s: float | None, is_interrupted: threading.Event
    ) -> Iterator[tuple[int, router_pb2.TraceResponse]]:
        """Yield (index of the router, message) until every stream has ended, the time is over, or it is interrupted.

        A stream that breaks is told on stderr; raises what broke the last one.
        """
        num_open = len(self._addresses)
        while num_open and not is_interrupted.is_set():
            left_s = _PROGRESS_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return
            try:
                index, item = self._arrived.get(timeout=min(left_s, _PROGRESS_S))
            except queue.Empty:
                continue
            if isinstance(item, router_pb2.TraceResponse):
                yield index, item
                continue
            num_open -= 1
            if item is not None:
                if not num_open:
                    raise item
                sys.stderr.write(f"router {self._addresses[index]} records no more: {item.message}\n")

    def _read(self, index: int, channel: grpc.Channel) -> None:
        stub: Any = router_pb2_grpc.RouterStub(channel)
        end: CollegiumError | None = None
        try:
            for message in stub.Trace(router_pb2.TraceRequest(num_tokens=self._num_tokens)):
                self._put(index, message)
        except grpc.RpcError as error:
            end = from_rpc_error(error)
        except ValueError:  # the channel was closed before the call began
            return
        self._put(index, end)

    def _put(self, index: int, item: router_pb2.TraceResponse | CollegiumError | None) -> None:
        while not self._is_closed.is_set():
            try:
                self._arrived.put((index, item), timeout=_PROGRESS_S)
            except queue.Full:
                continue
            return


class Recording:
    """What was recorded so far, on its way to the file."""

    def __init__(self, file: TextIO) -> None:
        """Nothing is written before the first router has described its model."""
        self._file = file
        self._header: router_pb2.TraceHeader | None = None
        self._writer: TraceWriter | None = None
        self._num_layers = 0
        self._turns: dict[tuple[int, int], int] = {}  # by router and its number of the sequence
        self._shown_s = 0.0
        self.num_tokens = 0

    def take(self, index: int, message: router_pb2.TraceResponse) -> None:
        """Write what a router said. Raises FailedPrecondition where routers serve different models."""
        if message.HasField("header"):
            self._open(message.header)
            return
        step = message.step
        turns = [self._turns.setdefault((index, number), len(self._turns)) for number in step.sequences]
        for layer in step.layers:
            self._write(step, layer, turns)
        if step.layers and step.layers[-1].layer == self._num_layers - 1:
            self.num_tokens += len(turns)

    def show(self, *, is_last: bool) -> None:
        """Flush the file, and tell on stderr how far it is: as it goes on a terminal, else at the end."""
        now_s = time.monotonic()
        if not is_last and now_s - self._shown_s < _PROGRESS_S:
            return
        self._shown_s = now_s
        self._file.flush()
        is_terminal = sys.stderr.isatty()
        if not is_last and not is_terminal:
            return
        text = f"recorded {self.num_tokens} tokens of {len(self._turns)} sequences"
        sys.stderr.write(("\r" if is_terminal else "") + text + ("\n" if is_last else ""))
        sys.stderr.flush()

    def _open(self, header: router_pb2.TraceHeader) -> None:
        if self._header is not None and header != self._header:
            raise FailedPrecondition(
                f"routers serve different models: {header.model.name} and {self._header.model.name}",
                reason="DIFFERENT_MODELS",
                remedy="name one router with --router",
            )
        if self._header is None:
            self._writer = TraceWriter(
                self._file,
                model=header.model.name,
                arch=header.model.architecture,
                num_layers=header.model.num_moe_layers,
                num_experts=header.model.num_experts,
                top_k=header.model.top_k,
                expert_bytes=header.expert_bytes,
            )
        self._header, self._num_layers = header, header.model.num_moe_layers

    def _write(self, step: router_pb2.TracedStep, layer: router_pb2.TracedLayer, turns: Sequence[int]) -> None:
        assert self._writer is not None and self._header is not None
        size = self._header.expert_bytes[layer.layer]
        experts, weights = list(layer.experts), list(layer.weights)
        missed, unread = set(layer.missed), set(layer.missed)
        top_k = len(experts) // len(turns)
        for row, (turn, position) in enumerate(zip(turns, step.positions, strict=True)):
            chosen = experts[row * top_k : (row + 1) * top_k]
            self._writer.write(
                turn=turn,
                phase=DECODE if row < step.num_decode_rows else PREFILL,
                step=position,
                layer=layer.layer,
                experts=chosen,
                weights=weights[row * top_k : (row + 1) * top_k],
                residency=[int(expert not in missed) for expert in chosen],
                expert_bytes=[size if expert in unread else 0 for expert in chosen],
            )
            unread.difference_update(chosen)


def _find_routers(target: str, api_key: str | None, tls: bool, tls_ca: Path | None) -> list[str]:
    with t.open_client(target, api_key, tls, tls_ca, _CALL_S) as client:
        members = client.get_cluster().members
    addresses = [member.address for member in members if member.role == "router" and member.state == "SERVING"]
    if not addresses:
        raise Unavailable("no router is SERVING behind the gateway", reason="NO_ROUTER")
    return addresses
