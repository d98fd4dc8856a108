"""The worker's end of all its socket links: listens, checks secrets, and moves bytes between polls.

One thread owns the port; expect, drop, wake, links and close are for any thread. Never waits for one peer: a slow or
broken one harms its own link alone. Knows nothing of experts.
"""

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from collegium.link import header
from collegium.link.base import MAX_HINTS, Arrival, ExpectedLink, HintArrival, LinkStats
from collegium.link.caller import HELLO_WITHIN_S, Caller
from collegium.link.expected import ExpectedLinks
from collegium.link.frame import HEADER_BYTES, FrameError, Hint, LinkClosed, LinkError, Reply
from collegium.link.listener import accept, listen_tcp, listen_unix
from collegium.link.port_link import PortLink
from collegium.link.rows_apart import OpenCarrier
from collegium.link.stream import Stream, send_all

MAX_CALLERS: Final = 64  # connections that have not said HELLO yet
_MUTED_S: Final = 0.1  # between tries to accept while the process has no descriptor left
_MEET_WITHIN_S: Final = 30.0  # what making communicators may take

log = logging.getLogger("collegium.link")


class TcpPort:
    """A WorkerPort over TCP, a unix socket, or both."""

    def __init__(
        self,
        *,
        worker_id: str,
        bind: str | None = None,
        unix: str | None = None,
        tls: ssl.SSLContext | None = None,
        open_carrier: OpenCarrier | None = None,
    ) -> None:
        """Listen on `bind` ("HOST:PORT", port 0 for any) and on `unix` (a path, "@name", or "@" for any abstract name).

        `tls` wraps the TCP connections, never the unix socket. With `open_carrier` (see nccl.opener) the TCP address is
        offered as "nccl" too, for links whose rows travel apart. Raises OSError where an address cannot be had.
        """
        if open_carrier is not None and (bind is None or tls is not None):
            raise ValueError("links whose rows travel apart need `bind`, and cannot be put under TLS")
        if bind is None and unix is None:
            raise ValueError("a port listens on `bind`, on `unix`, or on both")
        self._worker_id = worker_id
        self._tls = tls
        self._epoll = select.epoll()
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._muted: dict[int, float] = {}  # until when listeners, by descriptor, are not listened to
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._callers: dict[int, Caller] = {}  # by descriptor, oldest first
        self._by_fd: dict[int, PortLink] = {}
        self._by_id: dict[int, PortLink] = {}
        self._ready: set[int] = set()  # descriptors to look at though the kernel shows nothing: TLS bytes, rows landing
        self._hints: deque[HintArrival] = deque(maxlen=MAX_HINTS)
        self._writing: set[int] = set()  # descriptors that wait to send
        self._expected = ExpectedLinks()
        self._open_carrier = open_carrier
        self._guard = threading.Lock()  # of those below, which any thread may touch
        self._drops: list[tuple[int, str]] = []
        self._meeting: set[Stream] = set()  # streams of links whose carrier is being opened in a thread
        self._met: list[PortLink] = []
        self._is_closing = False
        self._owner = threading.Lock()  # held while polling, so that `close` knows when to give up the descriptors
        self.addresses: Sequence[tuple[str, str]] = ()
        try:
            if bind is not None:
                self._listen("tcp", *listen_tcp(bind))
            if open_carrier is not None:
                self.addresses = (*self.addresses, ("nccl", dict(self.addresses)["tcp"]))
            if unix is not None:
                self._listen("unix", *listen_unix(unix))
        except BaseException:
            self.close()
            raise

    def _listen(self, transport: str, listener: socket.socket, address: str) -> None:
        self._listeners[listener.fileno()] = (listener, transport)
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self.addresses = (*self.addresses, (transport, address))

    # What any thread may call.

    def expect(self, link: ExpectedLink) -> None:
        """Let a router open `link` once; see WorkerPort.expect."""
        if link.link_id in self._by_id:
            raise ValueError(f"link {link.link_id} is open already")
        self._expected.add(link)

    def drop(self, link_id: int, reason: str) -> None:
        """End one link at the next poll; see WorkerPort.drop."""
        with self._guard:
            self._drops.append((link_id, reason))
        self.wake()

    def wake(self) -> None:
        """Make the current or next poll return."""
        with self._guard:
            if not self._is_closing:
                os.eventfd_write(self._wake_fd, 1)

    def links(self) -> dict[int, LinkStats]:
        """Return a copy of the counters of each open link."""
        return {link_id: replace(link.stats) for link_id, link in list(self._by_id.items())}

    def close(self) -> None:
        """End every link and stop listening; see WorkerPort.close."""
        with self._guard:
            was_closing, self._is_closing = self._is_closing, True
            for stream in self._meeting:
                stream.shutdown()
            if not was_closing:
                os.eventfd_write(self._wake_fd, 1)
        if was_closing or not self._owner.acquire(timeout=1.0):  # a signal handler that interrupts the owner itself
            return
        try:
            for link in list(self._by_id.values()):
                self._end(link, "the worker is closing its port")
            for link in self._met:
                link.close()
            for caller in list(self._callers.values()):
                self._forget(caller)
            for listener, _ in self._listeners.values():
                listener.close()
            for transport, address in self.addresses:
                if transport == "unix" and not address.startswith("@"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(address)
            self._epoll.close()
            os.close(self._wake_fd)
        finally:
            self._owner.release()

    # What the owner calls.

    def poll(self, timeout_s: float) -> list[Arrival]:
        """Move what can move and return what has arrived; see WorkerPort.poll."""
        with self._owner:
            if self._is_closing:
                raise LinkClosed("the port is closed")
            if self._callers:
                timeout_s = min(timeout_s, self._expire_callers())
            if self._muted:
                timeout_s = min(timeout_s, self._unmute())
            arrivals: list[Arrival] = []
            events = self._epoll.poll(0.0 if self._ready else timeout_s)
            if self._is_closing:
                raise LinkClosed("the port is closed")
            if self._ready:
                seen = {fd for fd, _ in events}
                events += [(fd, select.EPOLLIN) for fd in self._ready - seen]
                self._ready.clear()
            for fd, mask in events:
                link = self._by_fd.get(fd)
                if link is not None:
                    self._serve(link, mask, arrivals)
                elif fd == self._wake_fd:
                    os.eventfd_read(fd)
                    self._do_drops()
                    self._take_met()
                elif fd in self._listeners:
                    self._accept(*self._listeners[fd])
                elif fd in self._callers:
                    self._greet(self._callers[fd])
            return arrivals

    def hints(self) -> list[HintArrival]:
        """Return the hints that polls have read; see WorkerPort.hints."""
        hints = list(self._hints)
        self._hints.clear()
        return hints

    def reply(self, link_id: int, reply: Reply) -> None:
        """Answer a dispatch without blocking; see WorkerPort.reply."""
        with self._owner:
            link = self._by_id.get(link_id)
            if link is not None:
                link.reply(reply)
                self._settle(link)

    def progress(self, link_id: int) -> None:
        """Tell a router that its dispatch is being worked on; see WorkerPort.progress."""
        with self._owner:
            link = self._by_id.get(link_id)
            if link is not None:
                link.progress()
                self._settle(link)

    @property
    def epoll_fd(self) -> int:
        """What shows whether a poll would find anything; for the borrower of a link."""
        return self._epoll.fileno()

    def lend(self) -> list[PortLink]:
        """Hand all links over to what reads and answers whole frames by itself, until `take_back`.

        None of them, and then there is no loan, where there is a caller or a hint, or where a link is amid a frame, or
        is no plain socket.
        """
        self._owner.acquire()
        if not (self._is_closing or self._callers or self._ready or self._hints):
            links = list(self._by_id.values())
            if links and all(link.is_idle for link in links):
                return links
        self._owner.release()
        return []

    def take_back(self, links: Sequence[PortLink]) -> None:
        """End a loan."""
        for link in links:
            self._settle(link)
        self._owner.release()

    def _serve(self, link: PortLink, mask: int, arrivals: list[Arrival]) -> None:
        """Write to and read from one link; whatever goes wrong ends that link alone."""
        try:
            if mask & select.EPOLLOUT:
                link.flush()
            frame = link.read() if mask & ~select.EPOLLOUT else None
            if isinstance(frame, Hint):
                self._note(link, frame)
                frame = link.read()  # the dispatch that the hint runs ahead of may be here already
                if isinstance(frame, Hint):
                    self._note(link, frame)
                    frame = None
        except FrameError as error:
            self._end(link, f"bad frame: {error}")
            return
        except (LinkClosed, OSError) as error:
            self._end(link, str(error), tell=False)
            return
        if frame is not None:
            arrivals.append(
                Arrival(link_id=link.link_id, router_id=link.router_id, dispatch=frame, received_s=time.monotonic())
            )
        self._settle(link)

    def _note(self, link: PortLink, hint: Hint) -> None:
        self._hints.append(HintArrival(link_id=link.link_id, router_id=link.router_id, hint=hint))

    def _settle(self, link: PortLink) -> None:
        """After any work on a link: end it where it broke, and wait for the events that it needs."""
        if link.end_reason:
            self.drop(link.link_id, link.end_reason)  # by the next poll: the owner may be amid its list of links
            return
        fd, has_queued = link.fd, link.has_queued
        if link.has_hidden:
            self._ready.add(fd)
        if has_queued != (fd in self._writing):
            if has_queued:
                self._writing.add(fd)
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
            else:
                self._writing.discard(fd)
                self._epoll.modify(fd, select.EPOLLIN)

    def _end(self, link: PortLink, reason: str, *, tell: bool = True) -> None:
        log.info("link %d of router %s ended: %s", link.link_id, link.router_id, reason)
        fd = link.fd
        if tell:
            link.say_goodbye(reason)
        self._by_id.pop(link.link_id, None)
        self._by_fd.pop(fd, None)
        self._ready.discard(fd)
        self._writing.discard(fd)
        self._epoll.unregister(fd)
        link.close()

    def _do_drops(self) -> None:
        with self._guard:
            drops, self._drops = self._drops, []
        for link_id, reason in drops:
            link = self._by_id.get(link_id)
            if link is not None:
                self._end(link, reason)

    # Those who call.

    def _accept(self, listener: socket.socket, transport: str) -> None:
        try:
            stream = accept(listener, self._tls if transport == "tcp" else None)
        except BlockingIOError:
            return
        except OSError as error:  # it went away again, or no descriptor is left
            if not self._muted:
                log.warning("a connection could not be accepted: %s", error)
            self._epoll.modify(listener, 0)  # or every poll would find it again
            self._muted[listener.fileno()] = time.monotonic() + _MUTED_S
            return
        if len(self._callers) >= MAX_CALLERS:
            self._forget(next(iter(self._callers.values())))
        self._callers[stream.fileno()] = Caller(stream, transport)
        self._epoll.register(stream.fileno(), select.EPOLLIN)

    def _unmute(self) -> float:
        """Listen again where the pause is over; return how long the next one has."""
        now_s = time.monotonic()
        for fd, until_s in list(self._muted.items()):
            if until_s <= now_s:
                del self._muted[fd]
                self._epoll.modify(fd, select.EPOLLIN)
        return min(self._muted.values(), default=now_s + HELLO_WITHIN_S) - now_s

    def _expire_callers(self) -> float:
        """Forget the callers that said nothing in time; return how long the next one has."""
        now_s = time.monotonic()
        for caller in list(self._callers.values()):
            if caller.expires_s > now_s:
                return caller.expires_s - now_s
            self._forget(caller)
        return HELLO_WITHIN_S

    def _forget(self, caller: Caller, reason: str = "") -> None:
        fd = caller.stream.fileno()
        if reason:
            log.info("a caller was refused: %s", reason)
            caller.farewell(reason)
        del self._callers[fd]
        self._epoll.unregister(fd)
        caller.stream.shutdown()
        caller.stream.close()

    def _greet(self, caller: Caller) -> None:
        """Read a caller's HELLO; make it a link, or turn it away."""
        try:
            if not caller.read():
                return
            secret, dtype, d_model = header.read_hello(caller.buffer[HEADER_BYTES:])
            expected = self._expected.claim(
                caller.link_id, secret, dtype, d_model, are_rows_apart=caller.wants_rows_apart
            )
            if expected.are_rows_apart and self._open_carrier is None:
                raise FrameError("this worker's rows travel in frames only")
        except FrameError as error:
            self._forget(caller, str(error))
            return
        except (LinkClosed, OSError) as error:
            log.debug("a caller went away: %s", error)
            self._forget(caller)
            return
        fd = caller.stream.fileno()
        del self._callers[fd]
        welcome = header.welcome(expected.link_id, expected.shape, self._worker_id)
        if self._open_carrier is None or not expected.are_rows_apart:
            link = PortLink(caller.stream, expected, caller.sent_us)
            link.post(welcome)
            self._add(link)
            return
        self._epoll.unregister(fd)
        with self._guard:
            self._meeting.add(caller.stream)
        meet = (caller, expected, welcome, self._open_carrier)
        threading.Thread(target=self._meet, args=meet, name=f"link-{expected.link_id}", daemon=True).start()

    def _meet(self, caller: Caller, expected: ExpectedLink, welcome: bytes, open_carrier: OpenCarrier) -> None:
        """Open a link's carrier with its router, in a thread of its own: that takes long, and the port goes on."""
        stream, deadline_s = caller.stream, time.monotonic() + _MEET_WITHIN_S
        link: PortLink | None = None
        try:
            send_all(stream, welcome, deadline_s)
            link = PortLink(stream, expected, caller.sent_us, open_carrier(stream, deadline_s))
        except (LinkError, OSError) as error:
            log.warning("link %d of router %s could not be opened: %s", expected.link_id, expected.router_id, error)
        with self._guard:
            self._meeting.discard(stream)
            has_port = not self._is_closing
            if link is not None and has_port:
                self._met.append(link)
        if link is None:
            stream.shutdown()
            stream.close()
        elif has_port:
            self.wake()
        else:
            link.close()

    def _take_met(self) -> None:
        with self._guard:
            met, self._met = self._met, []
        for link in met:
            self._epoll.register(link.fd, select.EPOLLIN)
            self._add(link)

    def _add(self, link: PortLink) -> None:
        self._by_fd[link.fd] = link
        self._by_id[link.link_id] = link
        self._settle(link)
        log.info("link %d of router %s opened", link.link_id, link.router_id)
