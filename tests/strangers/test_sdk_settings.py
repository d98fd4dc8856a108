"""What an SDK's user gives it once: a key, a file of certificates, a number of workers; refused by name, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from collegium.client import AsyncClient, Client
from collegium.fabric.errors import InvalidArgument, SettingsError

TARGET = "127.0.0.1:1"


@pytest.mark.parametrize("key", ["schlüssel", "abc\r", "key\n", "k\x00", "k\x7f"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_no_header_can_carry_is_refused_before_any_call(kind: type, key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        kind(TARGET, api_key=key)
    assert caught.value.field == "api_key"
    assert repr(key) not in caught.value.message


@pytest.mark.parametrize("content", [b"sk-1\nsk-2\n", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nnone\n"])
def test_a_file_without_a_certificate_is_told_as_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    for ca in (path, str(path), content):
        with pytest.raises(SettingsError, match="holds no certificate in PEM"):
            Client(TARGET, tls_ca=ca)


@pytest.mark.parametrize("number", [-1, 2**32, 2**40])
def test_a_number_that_no_message_holds_is_named(number: int) -> None:
    with Client(TARGET) as client, pytest.raises(InvalidArgument) as caught:
        client.scale_workers(number)
    assert caught.value.field == "num_workers"
    assert "num_workers" in str(caught.value)
