"""Files of secrets as editors, shells and other systems leave them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.cli.preflight import check_tls
from collegium.fabric import rpc
from collegium.fabric.api_keys import read_keys
from collegium.fabric.errors import SettingsError
from collegium.fabric.secret_files import warn_if_open
from gateway.auth import KeyRing
from tests.gateway_rig import certificate

MARKS = {"none": "utf-8", "of UTF-8": "utf-8-sig", "of UTF-16": "utf-16", "of big-endian UTF-16": "utf-16-be"}
KEYS = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40), min_size=1)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old"])
def test_keys_are_read_whatever_editor_wrote_them(tmp_path: Path, mark: str, line_end: str) -> None:
    lines = ["first key", "  second\t", "", "# a comment: clé", "third#not-a-comment"]
    text = ("\ufeff" if MARKS[mark] == "utf-16-be" else "") + line_end.join(lines)
    (tmp_path / "keys").write_bytes(text.encode(MARKS[mark]))
    assert read_keys(tmp_path / "keys") == ["first key", "second", "third#not-a-comment"]
    assert KeyRing.load(tmp_path / "keys").accepts("first key")


@settings(max_examples=30)
@given(KEYS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_each_key_of_a_file_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], line_end: str, has_mark: bool, ends_in_one: bool
) -> None:
    keys = [key for key in keys if not key.startswith("#")] or ["k"]
    path = tmp_path_factory.getbasetemp() / "any-keys"
    text = line_end.join(keys) + (line_end if ends_in_one else "")
    path.write_bytes(text.encode("utf-8-sig" if has_mark else "utf-8"))
    assert read_keys(path) == keys


def test_files_that_were_joined_keep_no_mark_within(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("one\n".encode("utf-8-sig") + "two\n".encode("utf-8-sig"))
    assert read_keys(tmp_path / "keys") == ["one", "two"]


@pytest.mark.parametrize("key", ["clé", "k\u200bey", "k\u00a0ey", "🔑", "k\x07ey"])
def test_a_key_that_no_caller_can_send_is_told_by_its_line_and_not_by_itself(tmp_path: Path, key: str) -> None:
    (tmp_path / "keys").write_text(f"good\n\n{key}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="the key in line 3 has a character") as caught:
        read_keys(tmp_path / "keys")
    assert key not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x80secret\n", b"secret\xff", b"\xff\xfe\x00\xd8s\x00", b"k" * (2**20 + 1)])
def test_bytes_that_are_no_text_are_told_without_the_secret(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(SettingsError, match=r"--api-keys=\S+ cannot be (read|used)") as caught:
        read_keys(tmp_path / "keys")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o400, ""),
        (0o600, ""),
        (0o440, ""),
        (0o640, ""),
        (0o604, "read by every user"),
        (0o644, "read by every user"),
        (0o660, "CHANGED by other users"),
        (0o622, "CHANGED by other users"),
        (0o602, "CHANGED by other users"),
        (0o666, "CHANGED by other users"),
    ],
    ids=lambda value: oct(value) if isinstance(value, int) else "",
)
def test_a_file_that_others_can_change_or_read_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, said: str
) -> None:
    path = tmp_path / "keys"
    path.write_text("k\n")
    path.chmod(mode)
    KeyRing.load(path)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
    assert "k\n" not in [record.getMessage() for record in caplog.records]


def test_a_file_that_is_not_there_is_whoevers_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_open(tmp_path / "none", "--tls-key")
    assert not caplog.records


ENCRYPTED = {
    "PKCS #8": ("pkcs8", "-topk8", "-v2", "aes256", "-passout", "pass:word"),
    "OpenSSL's older form": ("ec", "-aes256", "-passout", "pass:word"),
}


def encrypt(key: Path, form: tuple[str, ...], locked: Path, mark: bytes) -> None:
    subprocess.run(["openssl", *form, "-in", key, "-out", locked], check=True, capture_output=True)
    locked.write_bytes(mark + locked.read_bytes())


@pytest.mark.parametrize("form", ENCRYPTED)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
async def test_a_key_with_a_password_is_refused_with_how_to_write_it_without_one(
    form: str, mark: bytes, tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path)
    locked = tmp_path / "locked.pem"
    encrypt(key, ENCRYPTED[form], locked, mark)
    told = f"--tls-key={locked} cannot be used: it is encrypted.*openssl pkey -in {locked} -out plain.pem"
    with pytest.raises(SettingsError, match=told):
        check_tls(cert, locked, None)
    with pytest.raises(SettingsError, match=told):
        await rpc.Server("tls", tls=rpc.TlsFiles(cert=cert, key=locked)).start("127.0.0.1:0")


async def test_a_private_key_is_looked_at_and_read_without_a_mark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate(tmp_path)
    key.chmod(0o644)
    for path in (cert, key):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_tls(cert, key, cert)
    server = rpc.Server("tls", tls=rpc.TlsFiles(cert=cert, key=key))
    address = await server.start("127.0.0.1:0")
    try:
        assert "--tls-key" in str([getattr(record, "collegium_fields", {}) for record in caplog.records])
        async with rpc.channel(address.replace("127.0.0.1", "localhost"), tls=rpc.TlsTrust(ca=cert)) as channel:
            await channel.channel_ready()
    finally:
        await server.stop(0)
