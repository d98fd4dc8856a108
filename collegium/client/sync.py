"""The blocking client. Drives the state machines of retry and generate_call over grpc's synchronous channels.

Owns channels, one per address, opened at first use. Safe to share among threads; a Stream belongs to one thread, but
any thread may cancel it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span

from collegium.client.connection import Connection, Reach
from collegium.client.generate_call import CallView, GenerateCall
from collegium.client.options import GenerateOptions, ScoreOptions, generate_request, score_request, uint
from collegium.client.passages import Passages
from collegium.client.results import (
    Chunk,
    Cluster,
    Completion,
    Model,
    Scaling,
    Score,
    Translated,
    read_cluster,
    read_model,
    read_scaling,
    read_score,
)
from collegium.client.retry import Addresses, Attempts, RetryPolicy
from collegium.client.spans import GenerateSpan, mark_failed, unary_span
from collegium.client.translate_call import TranslateCall, TranslateOptions, translate_options
from collegium.fabric.channels import blocking_channel
from collegium.fabric.errors import CollegiumError, FailedPrecondition, from_rpc_error
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc


class Client:
    """A blocking client of one cluster, as a context manager or until close().

    target: HOST:PORT of a gateway, or several (a sequence, or separated by commas); http:// before it is dropped,
    https:// where TLS is spoken. InvalidArgument for what is no address. timeout_s: for each whole call,
    retries included, unless the call gives its own; None: no limit.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls: bool = False,
        tls_ca: str | Path | bytes | None = None,
        tls_server_name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        connection = Connection(api_key=api_key, tls=tls, tls_ca=tls_ca, tls_server_name=tls_server_name)
        self._reach = Channels(target, connection, retry, timeout_s)

    def __enter__(self) -> Client:
        """Use the client until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """End every call and connection. Idempotent."""
        self._reach.close()

    @property
    def targets(self) -> tuple[str, ...]:
        """The gateways' addresses, HOST:PORT each."""
        return self._reach.addresses.names

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Stream the continuation of a prompt; see GenerateOptions. The call begins with the first chunk asked for."""
        return Stream(self._reach, GenerateCall(generate_request(prompt, options)), options.get("timeout_s"))

    def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate, and give everything at the end."""
        with self.generate(prompt, **options) as stream:
            return stream.completion()

    def translate(
        self,
        text: str,
        *,
        to: str = "",
        source: str = "",
        split: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[TranslateOptions],
    ) -> Translated:
        """Translate one text; see TranslateOptions. to, source: codes of languages, such as "fra_Latn"; empty: as the
        model's files say. split: as translate_all has it. Raises what the text failed by.
        """
        (found,) = self.translate_all([text], to=to, source=source, split=split, timeout_s=timeout_s, **options)
        if found.error is not None:
            raise found.error
        return found

    def translate_all(
        self,
        texts: Iterable[str],
        *,
        to: str = "",
        source: str = "",
        split: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[TranslateOptions],
    ) -> Iterator[Translated]:
        """Translate texts, several at a time; give each in its turn. One that fails has its error, and others go on.

        split: translate each text sentence by sentence, and keep what lies between them; needs the extra "sentences",
        and fails a text whose sentences do not all succeed. The texts are taken as they are needed, in another thread.
        """
        call = TranslateCall(translate_options(to, source, options))
        if not split:
            return _translations(self._reach, call, texts, timeout_s)
        passages = Passages(source, options.get("n", 1))
        found = _translations(self._reach, call, passages.cut_all(texts), timeout_s)
        return (whole for one in found if (whole := passages.join(one)) is not None)

    def score(self, prompt: str | None = None, **options: Unpack[ScoreOptions]) -> Score:
        """Give the log-probability of every token of a text, or of an answer to it, and the perplexity."""
        timeout_s = options.get("timeout_s")
        return read_score(self._reach.ask("Score", score_request(prompt, options), timeout_s))

    def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """Name the models that are served."""
        response: pb.ListModelsResponse = self._reach.ask("ListModels", pb.ListModelsRequest(), timeout_s)
        return tuple(read_model(model) for model in response.models)

    def get_model(self, model: str = "", *, timeout_s: float | None = None) -> Model:
        """Describe one model; NotFound for a name that is not served."""
        return read_model(self._reach.ask("GetModel", pb.GetModelRequest(model=model), timeout_s).model)

    def get_cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """Describe the services behind the gateway."""
        return read_cluster(self._reach.ask("GetCluster", pb.GetClusterRequest(), timeout_s))

    def scale_workers(self, num_workers: int, *, timeout_s: float | None = None) -> Scaling:
        """Say how many expert workers there should be; whoever starts processes follows."""
        request = pb.ScaleWorkersRequest(num_workers=uint("num_workers", num_workers))
        return read_scaling(self._reach.ask("ScaleWorkers", request, timeout_s))

    def cancel(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """End a running request by its id, at every gateway that is known; whether one had it running."""
        request = pb.CancelRequest(request_id=request_id)
        names = self._reach.addresses.names
        found = [self._reach.ask("Cancel", request, timeout_s, (name,)).was_running for name in names]
        return any(found)


class Channels(Reach):
    """One channel per address, and the calls on them."""

    def __init__(
        self, target: str | Sequence[str], connection: Connection, policy: RetryPolicy | None, timeout_s: float | None
    ) -> None:
        super().__init__(target, connection, policy, timeout_s)
        self._channels: dict[str, grpc.Channel] = {}
        self._is_closed = False
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._of_parent: list[grpc.Channel] = []  # kept, for closing them here would close the parent's connections

    def close(self) -> None:
        """Close every channel."""
        self._renew_after_fork()
        with self._lock:
            self._is_closed = True
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def open(self, call: GenerateCall, address: str, timeout_s: float | None, span: Span) -> Any:
        """Open one try's stream."""
        request = call.next_request()
        stub = self._stub(address)
        method = stub.Resume if isinstance(request, pb.ResumeRequest) else stub.Generate
        return method(request, timeout=timeout_s, metadata=self.connection.metadata(span))

    def open_translate(self, feed: Iterator[pb.TranslateRequest], address: str, timeout_s: float | None) -> Any:
        """Open one try's stream of sentences."""
        metadata = self.connection.metadata(trace.INVALID_SPAN)
        return self._stub(address).Translate(feed, timeout=timeout_s, metadata=metadata)

    def ask(self, method: str, request: Any, timeout_s: float | None, only: tuple[str, ...] = ()) -> Any:
        """Make a unary call."""
        attempts = self.attempts(timeout_s, only)
        span = unary_span(method)
        metadata = self.connection.metadata(span)
        try:
            while True:
                left_s = attempts.time_left_s(time.monotonic())
                send = getattr(self._stub(attempts.address), method)
                try:
                    return send(request, timeout=left_s, metadata=metadata)
                except grpc.RpcError as error:
                    time.sleep(attempts.fail(from_rpc_error(error), time.monotonic()))
        except CollegiumError as error:
            mark_failed(span, error)
            raise
        finally:
            span.end()

    def _stub(self, address: str) -> Any:
        self._renew_after_fork()
        with self._lock:
            if self._is_closed:
                raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED", remedy="make another one")
            channel = self._channels.get(address)
            if channel is None:
                channel = blocking_channel(address, credentials=self.credentials, options=self.connection.options)
                self._channels[address] = channel
        return inference_pb2_grpc.InferenceStub(channel)

    def _renew_after_fork(self) -> None:
        if self._pid != os.getpid():
            # A lock may have been copied while a thread held it that is not here.
            self._lock, self.addresses, self._pid = threading.Lock(), Addresses(self.addresses.names), os.getpid()
            self._of_parent += self._channels.values()
            self._channels = {}


class Stream(CallView):
    """One generate call: an iterator over chunks, and a context manager that cancels what is not read."""

    def __init__(self, reach: Channels, call: GenerateCall, timeout_s: float | None) -> None:
        super().__init__(call)
        self._reach = reach
        self._timeout_s = timeout_s
        self._chunks = self._run()
        self._is_cancelled = threading.Event()
        self._rpc: Any = None

    @property
    def is_cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._is_cancelled.is_set()

    def __iter__(self) -> Iterator[Chunk]:
        """Iterate over chunks."""
        return self

    def __next__(self) -> Chunk:
        """Wait for the next chunk. Raises what ended the call, after retries and resumption have failed."""
        return next(self._chunks)

    def __enter__(self) -> Stream:
        """Use the stream until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what is not read."""
        self.cancel()
        self._chunks.close()

    def cancel(self) -> None:
        """End the call, from any thread; iteration then ends without an error. Idempotent."""
        self._is_cancelled.set()
        rpc = self._rpc
        if rpc is not None:
            rpc.cancel()

    def completion(self) -> Completion:
        """Read to the end, and give everything."""
        return self._call.completion(list(self))

    def _run(self) -> Generator[Chunk, None, None]:
        call = self._call
        span = GenerateSpan(call)
        attempts = self._reach.attempts(self._timeout_s)
        try:
            while not (call.is_complete or self.is_cancelled):
                left_s = attempts.time_left_s(time.monotonic())
                try:
                    self._rpc = self._reach.open(call, attempts.address, left_s, span.span)
                    if self.is_cancelled:
                        self._rpc.cancel()
                    for message in self._rpc:
                        attempts.succeed(time.monotonic())
                        yield from call.absorb(message)
                    call.end_stream()
                except grpc.RpcError as error:
                    self._pause(attempts, from_rpc_error(error))
                except CollegiumError as error:
                    self._pause(attempts, error)
        except CollegiumError as error:
            span.fail(error)
            raise
        finally:
            if self._rpc is not None:
                self._rpc.cancel()
            span.end()

    def _pause(self, attempts: Attempts, error: CollegiumError) -> None:
        # A stream that breaks after its last message, or because the caller ended it, is over.
        if not (self.is_cancelled or self._call.is_complete):
            self._is_cancelled.wait(attempts.fail(error, time.monotonic()))


class _Texts:
    """The caller's texts, which may take their time. What was taken for a stream that has broken is for the next."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._kept = iter(texts), list[str]()
        self._lock = threading.Lock()
        self.error: BaseException | None = None  # that they ended by

    def send_next(self, call: TranslateCall, stream: int) -> pb.TranslateRequest | None:
        """Write the next one down; None where there are no more, or for a stream that is over. Blocks on the caller."""
        with self._lock:
            if not self._kept and not call.has_all and call.is_current(stream):
                try:
                    self._kept.append(next(self._texts))
                except StopIteration:
                    call.has_all = True
                except BaseException as error:
                    self.error, call.has_all = error, True
            request = call.send(self._kept[0], stream) if self._kept else None
            if request is not None:
                self._kept.clear()
            return request


class _Feed:
    """Sentences on their way into one try's stream, in gRPC's own thread, until it is closed or there are no more."""

    def __init__(self, call: TranslateCall, texts: _Texts) -> None:
        self._call, self._texts = call, texts
        self._stream, again = call.begin()
        self._again = iter(again)
        self._wake = threading.Condition()
        self._is_closed = False

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> pb.TranslateRequest:
        for request in self._again:
            return request
        with self._wake:
            while not (self._call.has_room or self._is_closed):
                self._wake.wait()
        request = None if self._is_closed else self._texts.send_next(self._call, self._stream)
        if request is None:
            raise StopIteration
        return request

    def answered(self) -> None:
        """Let the next sentence come."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """End it."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()


def _translations(
    reach: Channels, call: TranslateCall, given: Iterable[str], timeout_s: float | None
) -> Generator[Translated, None, None]:
    """Run a translate call to its end, over as many streams as it takes."""
    attempts, texts = reach.attempts(timeout_s), _Texts(given)
    while not call.is_complete:
        feed, rpc = _Feed(call, texts), None
        try:
            rpc = reach.open_translate(feed, attempts.address, attempts.time_left_s(time.monotonic()))
            for response in rpc:
                attempts.succeed(time.monotonic())
                found = call.absorb(response)
                feed.answered()
                yield found
            call.end_stream()
        except grpc.RpcError as error:
            feed.close()
            time.sleep(attempts.fail(from_rpc_error(error), time.monotonic()))
        except CollegiumError as error:
            feed.close()
            time.sleep(attempts.fail(error, time.monotonic()))
        finally:
            feed.close()
            if rpc is not None:
                rpc.cancel()
    if texts.error is not None:
        raise texts.error
