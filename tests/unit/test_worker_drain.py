"""How long a worker that is to end waits for its routers."""

from __future__ import annotations

import contextlib

from collegium.link.base import LinkStats
from collegium.link.tcp_port import TcpPort
from expert_svc.app import wait_for_routers


class Linked(TcpPort):
    """A port whose links go one by one, whenever it is looked at."""

    def __init__(self, num_links: int, *, are_leaving: bool) -> None:
        super().__init__(worker_id="worker", unix="@")
        self.num_links, self._are_leaving = num_links, are_leaving

    def links(self) -> dict[int, LinkStats]:
        self.num_links -= self._are_leaving and self.num_links > 0
        return {link_id: LinkStats() for link_id in range(self.num_links)}


async def test_a_worker_waits_until_its_last_router_has_let_go_and_no_longer() -> None:
    with contextlib.closing(Linked(4, are_leaving=True)) as port:
        await wait_for_routers(port, 1e6)
        assert port.num_links == 0
        await wait_for_routers(port, 1e6)


async def test_a_worker_waits_for_a_router_that_does_not_hear_only_so_long() -> None:
    with contextlib.closing(Linked(1, are_leaving=False)) as port:
        await wait_for_routers(port, 0.05)
        assert port.num_links == 1
