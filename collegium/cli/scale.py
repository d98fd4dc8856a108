"""`collegium scale`: how many expert workers there should be; waits until there are."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from collegium.cli import target as t
from collegium.client import Client, Cluster
from collegium.fabric.errors import DeadlineExceeded

_POLL_S = 0.2
_CALL_S = 10.0
_SAY_EVERY_S = 5.0


def scale(
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=2**32 - 1, help="Expert workers wanted.", show_default=False)
    ],
    target: t.Target = t.DEFAULT_TARGET,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="Longest wait for it to come true; 0: do not wait.")
    ] = 120.0,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: t.AsJson = False,
) -> None:
    """Add or retire expert workers while the cluster serves.

    Processes are started and ended by `collegium up`, or by whoever else runs them; the balancer has a new worker load
    its experts before it gets rows, and empties one that retires before it ends.
    """
    began_s = time.monotonic()
    with t.open_client(target, api_key, tls, tls_ca, _CALL_S) as client:
        scaling = client.scale_workers(workers)
        if wait_s:
            _wait(client, workers, began_s + wait_s)
        cluster = client.get_cluster()
    took_s = time.monotonic() - began_s
    serving = _serving(cluster)
    if json:
        t.print_json(
            {
                "wanted": workers,
                "before": scaling.num_workers,
                "serving": len(serving),
                "placement_epoch": cluster.placement_epoch,
                "seconds": took_s,
            }
        )
        return
    t.print_line(
        f"{scaling.num_workers} -> {len(serving)} workers of {workers} wanted, "
        f"placement epoch {cluster.placement_epoch}, after {took_s:.1f} s"
    )


def _wait(client: Client, wanted: int, deadline_s: float) -> None:
    said_s = time.monotonic()
    while True:
        cluster = client.get_cluster()
        placed = {worker for worker, num_homes in cluster.experts_per_worker.items() if num_homes}
        workers = [member for member in cluster.members if member.role == "worker"]
        if len(workers) == wanted and {member.member_id for member in workers} == placed == set(_serving(cluster)):
            return
        states = ", ".join(f"{member.member_id} {member.state}" for member in workers)
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(
                f"{wanted} workers were not serving in time: {states}",
                remedy="see that whoever starts processes does, and `collegium status`",
            )
        if time.monotonic() - said_s > _SAY_EVERY_S:
            said_s = time.monotonic()
            sys.stderr.write(f"scale | waiting for {wanted} workers: {states}\n")
        time.sleep(_POLL_S)


def _serving(cluster: Cluster) -> list[str]:
    return [member.member_id for member in cluster.members if member.role == "worker" and member.state == "SERVING"]
