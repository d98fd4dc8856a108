"""The completion that `collegium up` shows when its cluster serves.

It is for show: whatever fails about it, a cluster that serves goes on, and one line says what happened.
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import Completion, Demand, completion_table, console, stream_completion, worker_counters
from collegium.fabric.channels import TlsTrust
from collegium.fabric.errors import CollegiumError, DeadlineExceeded

_LIMIT_S = 600.0
_LONGEST = 400  # characters of a reason


def show_completion(
    cluster: Cluster, spec: ClusterSpec, demand: Demand, say: Callable[[str], None], *, api_key: str | None = None
) -> bool:
    """Stream a completion to stdout and lay out its numbers; returns whether that succeeded.

    Raises what ends the cluster (ChildFailed) and Cancelled where it is interrupted, and nothing else.
    """
    answer: concurrent.futures.Future[Completion] = concurrent.futures.Future()
    tls = TlsTrust(ca=spec.tls_ca) if spec.tls_ca is not None else None
    targets = [target.replace("127.0.0.1", "localhost") if tls else target for target in cluster.targets]
    addresses = {member.name: member.address for member in cluster.members if member.role == "worker"}
    before = worker_counters(addresses)

    def ask() -> None:
        try:
            answer.set_result(stream_completion(targets, demand, sys.stdout, api_key=api_key, tls=tls))
        except BaseException as error:  # a library's panic too: somebody waits for the answer
            answer.set_exception(error)

    # In a thread, as this one supervises meanwhile; a daemon, so that an interrupt need not wait for it.
    threading.Thread(target=ask, name="completion", daemon=True).start()
    try:
        cluster.wait_until(answer.done, _LIMIT_S, "the first completion")
    except DeadlineExceeded as error:
        return _failed(error, say)
    error = answer.exception()
    if error is not None:
        return _failed(error, say)
    try:
        console(sys.stdout).print(completion_table(answer.result(), before, worker_counters(addresses)))
    except Exception as fault:
        return _failed(fault, say)
    return True


def _failed(error: BaseException, say: Callable[[str], None]) -> bool:
    kind, text = type(error).__name__, str(error)
    if isinstance(error, CollegiumError):
        kind, text = error.code.name, error.message
    why = " ".join(f"{kind}: {text}".split())
    say(f"the first completion failed, the cluster serves: {why[:_LONGEST]}")
    return False
