"""What routers ask a worker for: each field of OpenLink has a bound, and a refused request leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.v1 import expert_pb2 as pb
from expert_svc.service import ExpertService
from expert_svc.validation import BOUNDS

GOOD: dict[str, Any] = {
    "router_id": "router-1",
    "model_digest": "d",
    "model_parts": {"experts": "e"},
    "dtype": "float32",
    "transports": ["unix", "tcp"],
    "max_rows": 64,
    "host": "h",
}
BEYOND = [
    ("router_id", "x" * 100_000),
    ("router_id", "a\nb"),
    ("model_digest", "x" * 100_000),
    ("model_parts", {str(number): "e" for number in range(1000)}),
    ("model_parts", {"experts": "x" * 100_000}),
    ("model_parts", {"x" * 100_000: "e"}),
    ("dtype", "x" * 5_000),
    ("transports", ["x" * 5_000]),
    ("transports", ["tcp"] * 10_000),
    ("max_rows", 0),
    ("max_rows", 2**32 - 1),
    ("host", "x" * 100_000),
]


class Promises:
    """A port that notes what is promised."""

    addresses = (("tcp", "127.0.0.1:1"),)

    def __init__(self) -> None:
        self.links: list[Any] = []

    def expect(self, link: Any) -> None:
        self.links.append(link)


@pytest.fixture
def service() -> ExpertService:
    manifest: Any = type("Manifest", (), {"digest": "d", "parts": {}, "d_model": 8, "top_k": 2})()
    buffer: Any = type("Buffer", (), {"can_prefetch": False})()
    port: Any = Promises()
    return ExpertService(port, buffer, manifest, torch.float32, data_address="", counters=dict)


async def ask(service: ExpertService, **changes: Any) -> pb.OpenLinkResponse:
    context: Any = None
    return await service.OpenLink(pb.OpenLinkRequest(**(GOOD | changes)), context)


@pytest.mark.parametrize(("field", "value"), BEYOND, ids=lambda value: str(value)[:24])
async def test_a_field_beyond_its_bound_is_refused_by_name(service: ExpertService, field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{field}.*give ") as caught:
        await ask(service, **{field: value})
    assert len(caught.value.message) < 500
    port: Any = service._port  # pyright: ignore[reportPrivateUsage]
    assert port.links == []


async def test_a_request_within_its_bounds_is_promised(service: ExpertService) -> None:
    assert (await ask(service)).transport == "tcp"


async def test_what_a_router_wrote_comes_back_cut(service: ExpertService) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await ask(service, transports=[f"{i}" + "x" * 30 for i in range(8)])
    assert "characters)" in caught.value.message
    assert len(caught.value.message) < 300


def test_the_fields_are_those_of_the_request() -> None:
    assert set(BOUNDS) == {field.name for field in pb.OpenLinkRequest.DESCRIPTOR.fields}
    assert set(GOOD) == set(BOUNDS)
