"""The SDK where scripts, notebooks and test runners take it: several event loops, threads, forks, closed clients."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from collegium.client import AsyncClient, Client, FailedPrecondition
from collegium.client import loops as loops_module
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A gateway on a loop of a thread of its own: the tests' loops come and go."""
    addresses: list[str] = []
    is_up, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with rig(FakeRouter()) as served:
            addresses.append(served.address)
            is_up.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_up.wait(LIMIT_S)
    yield addresses[0]
    is_over.set()
    thread.join(LIMIT_S)


async def ask(client: AsyncClient) -> tuple[int, ...]:
    """Make a unary call and a stream."""
    assert (await client.get_model()).name
    return (await client.complete(prompt_ids=[5, 6], max_tokens=3)).choices[0].token_ids


def test_one_client_serves_one_asyncio_run_after_another(address: str) -> None:
    client = AsyncClient(address, timeout_s=LIMIT_S)
    answers = [asyncio.run(ask(client)) for _ in range(3)]
    assert len(set(answers)) == 1 and len(answers[0]) == 3
    assert len(client._reach._channels._channels) == 1, "channels of loops that are over are given back"
    asyncio.run(client.close())


def test_one_client_serves_loops_of_several_threads_at_once(address: str) -> None:
    client = AsyncClient(address, timeout_s=LIMIT_S)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: asyncio.run(ask(client)), range(8)))
    assert len(set(answers)) == 1


def test_a_stream_that_is_read_on_another_loop_says_so(address: str) -> None:
    client = AsyncClient(address, timeout_s=LIMIT_S)
    stream = client.generate(prompt_ids=[5], max_tokens=3)

    async def read() -> Any:
        return await anext(stream)

    asyncio.run(read())
    with pytest.raises(FailedPrecondition, match=r"another event loop.*ask anew here"):
        asyncio.run(read())


def test_a_client_that_is_closed_says_so_on_any_loop(address: str) -> None:
    client = AsyncClient(address)
    asyncio.run(ask(client))
    asyncio.run(client.close())
    asyncio.run(client.close())
    with pytest.raises(FailedPrecondition, match="the client is closed; make another one"):
        asyncio.run(ask(client))
    blocking = Client(address)
    blocking.close()
    blocking.close()
    with pytest.raises(FailedPrecondition, match="the client is closed; make another one"):
        blocking.get_model()


def test_closing_ends_the_channels_of_a_loop_that_still_runs(address: str) -> None:
    client = AsyncClient(address, timeout_s=LIMIT_S)
    is_used, may_end = threading.Event(), threading.Event()

    async def use_and_stay() -> None:
        await ask(client)
        is_used.set()
        await asyncio.to_thread(may_end.wait)

    other = threading.Thread(target=lambda: asyncio.run(use_and_stay()))
    other.start()
    assert is_used.wait(LIMIT_S)
    asyncio.run(client.close())
    may_end.set()
    other.join(LIMIT_S)
    with pytest.raises(FailedPrecondition, match="closed"):
        asyncio.run(ask(client))


def test_without_a_loop_of_asyncio_it_says_what_to_use(address: str) -> None:
    call = AsyncClient(address).get_model()
    with pytest.raises(FailedPrecondition, match="or use Client"):
        call.send(None)


def test_a_blocking_client_goes_on_in_a_forked_process_with_connections_of_its_own(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(address, timeout_s=LIMIT_S)
    name = client.get_model().name
    parents = list(client._reach._channels.values())
    client._reach._lock.acquire()  # as a thread may have that the fork did not copy
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert client.get_model().name == name
    assert client._reach._of_parent == parents
    assert not set(parents) & set(client._reach._channels.values())
    client.close()


def test_an_asyncio_client_after_a_fork_says_what_to_do(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = AsyncClient(address, timeout_s=LIMIT_S)
    asyncio.run(ask(client))
    monkeypatch.setattr(loops_module, "_home_pid", os.getpid() + 1)
    with pytest.raises(FailedPrecondition, match='"spawn", or use Client'):
        asyncio.run(ask(client))
