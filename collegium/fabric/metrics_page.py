"""The HTTP server of a metrics page: a few connections, a few seconds each.

Owns the sockets, their number and their time. What the page shows is prometheus_client's handler's. The accepting
thread cuts a connection whose time is over, and the oldest one when there are too many: a scrape takes milliseconds, so
the oldest is the one that says nothing.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import MetricsHandler
from prometheus_client.registry import Collector

from collegium.fabric import logs
from collegium.fabric.metric_names import series

_log = logs.get("metrics")
MAX_CONNECTIONS = 16
CONNECTION_S = 5.0  # from its acceptance to the end of the answer
_LOOK_EVERY_S = 0.25
_NO_DESCRIPTOR_S = 0.1  # between tries to accept while the process has no descriptor left
_ROOM_S = 1.0  # how long the threads of cut connections may take to end before a new one is refused


class MetricsPage(ThreadingHTTPServer):
    """Serves one page from a daemon thread. Connections are accepted, cut and counted there alone."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        registry: Collector,
        *,
        max_connections: int = MAX_CONNECTIONS,
        connection_s: float = CONNECTION_S,
    ) -> None:
        """Listen on (host, port). Raises OSError where that cannot be had."""
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, bound = found[0][0], found[0][4]
        self.num_cut = 0
        self._max_connections, self._connection_s = max_connections, connection_s
        self._began_s: dict[socket.socket, float] = {}  # when each connection was accepted, oldest first
        self._guard = threading.Condition()  # of _began_s, which the threads of connections take themselves off
        super().__init__(bound[:2], MetricsHandler.factory(registry))  # type: ignore[arg-type]
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_LOOK_EVERY_S,), name="metrics-page", daemon=True
        )
        self._thread.start()

    def counters(self) -> Mapping[str, float]:
        """Count the connections that were cut, by series. Any thread."""
        return {series("collegium_metrics_page_cuts_total"): float(self.num_cut)}

    def end(self) -> None:
        """Stop serving and give the port back."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._guard:
            left = list(self._began_s)
        for connection in left:
            _cut(connection)

    def server_bind(self) -> None:
        """Bind without asking the resolver for this host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; while no descriptor is left, wait instead of being woken for it without end."""
        try:
            connection, address = super().get_request()
        except OSError:
            time.sleep(_NO_DESCRIPTOR_S)
            raise
        connection.settimeout(2 * self._connection_s)  # it is cut before, and counted
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Make room for a connection; False, which closes it, if there is none."""
        self.service_actions()
        with self._guard:
            if len(self._began_s) >= self._max_connections:
                oldest = next(iter(self._began_s))
                self.num_cut += 1
                _cut(oldest)  # its thread ends by it and takes it off
                self._began_s[oldest] = self._began_s.pop(oldest)  # the next one to be cut is another
                if not self._guard.wait_for(lambda: len(self._began_s) < 2 * self._max_connections, _ROOM_S):
                    return False
            self._began_s[request] = time.monotonic()
        return True

    def service_actions(self) -> None:
        """Cut the connections whose time is over."""
        limit_s = time.monotonic() - self._connection_s
        with self._guard:
            for connection, began_s in self._began_s.items():
                if began_s <= limit_s:
                    self.num_cut += 1
                    _cut(connection)
                    self._began_s[connection] = time.monotonic() + self._connection_s  # cut once

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and take it off."""
        with self._guard:
            self._began_s.pop(request, None)
            self._guard.notify()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours; a connection that broke or was cut is none."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("the metrics page could not be made")


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is gone already
        connection.shutdown(socket.SHUT_RDWR)
