"""Programs that a gateway starts beside its calls are not crashed by gRPC's threads before they begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio, gateway, uvloop
from grpc import aio

async def main():
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        async def call():
            while True:
                try:
                    await channel.unary_unary("/nobody.Knows/Nothing")(b"")
                except aio.AioRpcError:
                    pass
        calls = [asyncio.create_task(call()) for _ in range(4)]
        ends = []
        for _ in range(150):
            process = await asyncio.create_subprocess_exec("true")
            ends.append(await process.wait())
        for one in calls:
            one.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    await server.stop(None)
    print(sorted(set(ends)))

uvloop.run(main())
"""


def test_no_child_of_a_process_that_serves_dies_before_it_is_another_program() -> None:
    # With gRPC's support of forks, one in thirty did, of SIGSEGV.
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[0]", done.stdout + done.stderr
