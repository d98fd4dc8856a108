"""Gateways' addresses as people write them: taken, or refused at once with the form that is wanted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from grpc import aio
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.client import AsyncClient, Client, InvalidArgument
from collegium.client.retry import Addresses
from collegium.fabric import rpc
from collegium.fabric.addresses import read_address
from collegium.fabric.channels import check_target
from collegium.fabric.errors import SettingsError
from collegium.fabric.leases import Membership
from collegium.v1.balancer_pb2 import ROLE_GATEWAY
from gateway.app import open_gateway
from gateway.settings import GatewaySettings
from tests.fake_router import FakeRouter
from tests.gateway_rig import DEMO, certificate, rig

TAKEN = {
    "127.0.0.1:50051": "127.0.0.1:50051",
    "http://127.0.0.1:50051": "127.0.0.1:50051",
    "HTTP://gateway:50051/": "gateway:50051",
    "grpc://gateway.ns.svc:50051": "gateway.ns.svc:50051",
    "dns:///gateway:50051": "gateway:50051",
    "dns:gateway:50051": "gateway:50051",
    "ipv4:10.0.0.1:50051": "10.0.0.1:50051",
    "http://[::1]:50051//": "[::1]:50051",
    "[fe80::1%eth0]:50051": "[fe80::1%eth0]:50051",
    "  gateway_0:050051\n": "gateway_0:50051",
    "dns:5": "dns:5",
    "xn--bcher-kva.example.:443": "xn--bcher-kva.example.:443",
}
REFUSED = {
    "https://127.0.0.1:50051": "tls=True",
    "grpcs://127.0.0.1:50051": "--tls",
    "redis://127.0.0.1:6379": "redis:// is not spoken here",
    "http://127.0.0.1:50051/v1": "it holds a path",
    "127.0.0.1:50051?x=1": "it holds a query",
    "http://user:word@h:50051": "it holds a user",
    "127.0.0.1": "the port is missing",
    "http://gateway": "the port is missing",
    "[::1]": "the port is missing",
    "50051": "the port is missing",
    ":50051": "the host is missing",
    "http://:50051": "the host is missing",
    "::1:50051": "in brackets",
    "2001:db8::1": "in brackets",
    "[gateway]:50051": "no IPv6 address",
    "[::1]50051": "no port",
    "h:0": "'0' is no port",
    "h:65536": "'65536' is no port",
    "h:²": "is no port",
    "h:٣": "is no port",
    "h:-1": "is no port",
    "h: 50051": "it holds a blank",
    "a:1 b:1": "separated by commas",
    "127.0.0.256:50051": "is no host",
    "bücher.example:50051": "xn--",
    "-h:50051": "is no host",
    "unix:/run/gateway.sock": "unix socket",
    "h\x00:1": "it holds a blank",
    "h" * 1000 + ":1": "1002 characters",
}


@pytest.mark.parametrize("text", TAKEN)
def test_what_can_only_mean_one_address_is_taken(text: str) -> None:
    assert Client(text).targets == AsyncClient(text).targets == (TAKEN[text],)


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_what_is_no_address_is_refused_at_once_with_the_form_that_is_wanted(text: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidArgument, match="give HOST:PORT") as caught:
            make(text)
        assert REFUSED[text] in caught.value.message
        assert caught.value.field == "target"


@pytest.mark.parametrize(
    "target", [50051, None, b"127.0.0.1:50051", [50051], ["h:1", None], {"h": 1}.values(), [], "", ","]
)
def test_what_is_no_text_is_refused_as_an_argument(target: Any) -> None:
    with pytest.raises(InvalidArgument, match="give HOST:PORT"):
        Client(target)


def test_a_scheme_and_the_wish_for_tls_must_agree(tmp_path: Any) -> None:
    cert, _ = certificate(tmp_path)
    assert Client("https://h:1, grpcs://h:2/", tls=True).targets == ("h:1", "h:2")
    assert Client("https://h:1", tls_ca=cert).targets == ("h:1",)
    with pytest.raises(InvalidArgument, match="plain text, but TLS is asked for"):
        Client("http://h:1", tls=True)


async def test_a_service_refuses_what_is_no_address_as_well() -> None:
    for text in (
        "https://127.0.0.1:1/x",
        "127.0.0.1",
        "127.0.0.1:1,nowhere",
        "127.0.0.1:1,h:2",
        "127.0.0.1:1,[::1]:2",
        ",",
    ):
        with pytest.raises(SettingsError, match=f"--balancer={text!r}".replace("[", r"\[")):
            check_target(text, "--balancer")
    check_target("http://127.0.0.1:1, 127.0.0.1:2", "--balancer")
    with pytest.raises(SettingsError, match="--balancer='nonsense' cannot be used: the port is missing"):
        async with Membership("nonsense", role=ROLE_GATEWAY, address="127.0.0.1:1"):
            pass
    with pytest.raises(SettingsError, match="--routers='nonsense'"):
        async with open_gateway(GatewaySettings(model=DEMO, routers=("nonsense",))):
            pass
    for setting, text in (("--bind", "http://h:1"), ("--bind", "h:²")):
        with pytest.raises(SettingsError, match="give HOST:PORT"):
            rpc.split_address(text, setting)


@pytest.mark.parametrize("text", [*REFUSED, "a:1,b:2", ",", ""], ids=lambda text: repr(text[:20]))
async def test_an_address_that_a_peer_tells_is_not_reached_and_raises_nothing_of_ours(text: str) -> None:
    async with rpc.channel(text) as channel:
        with pytest.raises(aio.AioRpcError):
            await channel.unary_unary("/a/B")(b"", timeout=0.05)


async def test_a_target_with_a_scheme_is_called() -> None:
    async with rig(FakeRouter()) as served, AsyncClient(f"http://{served.address}/") as client:
        assert (await client.get_model()).name


@settings(max_examples=40)
@given(st.text(max_size=40) | st.from_regex(r"[a-z]{0,5}(://)?[\[\]0-9a-f:.]{0,20}:?[0-9]{0,6}/?", fullmatch=True))
def test_any_text_is_an_address_that_reads_as_itself_or_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        address = read_address(text)
        assert read_address(address) == address
        host, _, port = address.rpartition(":")
        assert host and 0 < int(port) < 65536
    with contextlib.suppress(InvalidArgument):
        assert Addresses(text).names
