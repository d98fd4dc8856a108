"""A worker that doubles rows and a router that checks them, each a process of its own, over transport "nccl".

Run by tests/unit/test_link_nccl.py where NCCL can be used: `python -m tests.nccl_pair`.
"""

import subprocess
import sys
import time

import torch

from collegium.link import nccl
from collegium.link.base import ExpectedLink
from collegium.link.connect import connect
from collegium.link.frame import Dispatch, Reply
from collegium.link.tcp_port import TcpPort
from tests.link_rig import SECRET, dispatch, hint, soon

D, MAX_ROWS, NUM_DISPATCHES = 512, 256, 100


def serve() -> None:
    """Be the worker, on the last GPU."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    port = TcpPort(worker_id="worker-a", bind="127.0.0.1:0", open_carrier=nccl.opener(nccl.WORKER_RANK, device))
    port.expect(
        ExpectedLink(
            link_id=1,
            secret=SECRET,
            router_id="router-1",
            dtype=torch.float32,
            reply_dtype=torch.float32,
            d_model=D,
            max_rows=MAX_ROWS,
            num_credits=4,
            expires_s=soon(),
            are_rows_apart=True,
        )
    )
    router = subprocess.Popen([sys.executable, "-m", "tests.nccl_pair", dict(port.addresses)["nccl"]])
    try:
        while router.poll() is None:
            for arrival in port.poll(0.1):
                port.reply(arrival.link_id, _doubled(arrival.dispatch))
    finally:
        router.kill()
        router.wait()
        port.close()
    sys.exit(router.returncode)


def _doubled(dispatched: Dispatch) -> Reply:
    return Reply(seq=dispatched.seq, y=dispatched.x * 2, missed=dispatched.experts[: dispatched.seq % 3])


def route(address: str) -> None:
    """Be the router, on the first GPU."""
    torch.cuda.set_device(0)
    link = connect(
        "nccl", address, link_id=1, secret=SECRET, dtype=torch.float32, d_model=D, deadline_s=time.monotonic() + 60
    )
    for seq in range(0, NUM_DISPATCHES, 4):  # four in flight: sends of both ends cross
        sent = [torch.randn(1 + (s * 7) % MAX_ROWS, D, device="cuda") for s in range(seq, seq + 4)]
        for at, x in enumerate(sent):
            link.send(dispatch(seq + at, x.shape[0], x=x))
        link.hint(hint(seq))
        for at, x in enumerate(sent):
            reply = link.receive(seq + at, soon())
            assert reply.y is not None
            assert torch.equal(reply.y, x * 2)
            assert reply.num_misses == (seq + at) % 3
    link.close()
    sys.stdout.write(f"exchanged {NUM_DISPATCHES} dispatches\n")


if __name__ == "__main__":
    route(sys.argv[1]) if len(sys.argv) > 1 else serve()
