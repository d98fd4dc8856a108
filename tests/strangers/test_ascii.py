"""Every command on a terminal that knows ASCII alone: marks stand for what it cannot show, and nothing is raised."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collegium.cli.main import main
from collegium.cli.show import Completion, address_table, completion_table, console
from collegium.cli.up import say
from collegium.fabric import streams
from tests.fake_router import FakeRouter
from tests.gateway_rig import DEMO, rig

ENCODINGS = ("ascii", "latin-1", "koi8-r")
LOADS = "[[5, 1, 1, 1], [1, 1, 9, 1]]"


class Terminal:
    """stdout and stderr in an encoding, as a locale makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.encoding = encoding
        self.out, self.err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)

    def written(self) -> str:
        for stream in (self.out, self.err):
            stream.flush()
        return "".join(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (self.out, self.err))  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cäche"))
    (tmp_path / "löads.json").write_text(LOADS)
    (tmp_path / "modèle").symlink_to(DEMO)
    yield


async def test_commands_of_a_gateway_show_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(FakeRouter()) as served:
        at = ("--target", served.address)
        for argv in (
            ("generate", *at, "--prompt", "héllo 你好", "--max-tokens", "8"),
            ("generate", *at, "--prompt", "a", "--max-tokens", "4", "--n", "2", "--logprobs", "1"),
            ("generate", *at, "--prompt", "a", "--max-tokens", "4", "--json"),
            ("generate", *at, "--prompt", "a", "--model", "modèle"),
            ("status", *at),
            ("status", *at, "--json"),
            ("score", *at, "--prompt", "héllo 你好 there"),
            ("top", *at, "--once"),
            ("trace", "träce.csv", "--router", "nöwhere:1"),
            ("generate", "--target", "bücher:1", "--prompt", "é"),
        ):
            with monkeypatch.context() as patch:
                terminal = Terminal(patch, "ascii")
                patch.setattr(sys, "argv", ["collegium", *argv])
                status = await asyncio.to_thread(main)
            written = terminal.written()
            assert status in (0, 1, 2), (argv, written)
            assert (status == 0) == ("modèle" not in argv and "bücher:1" not in argv and "trace" not in argv), written
            assert "Traceback" not in written and "Error" not in written, (argv, written)
            assert written


@pytest.mark.parametrize(
    "argv",
    [
        ("plan", "--loads", "löads.json", "--workers", "2", "--slots", "6"),
        ("manifest", "modèle"),
        ("replay", "träce.csv"),
        ("up", "nö"),
        ("--help",),
        ("up", "--help"),
        ("nö",),
    ],
    ids=lambda argv: " ".join(argv).encode("ascii", "replace").decode(),
)
def test_commands_of_files_show_what_they_can(argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.cli.up._Interrupts", lambda: lambda: False)
    with monkeypatch.context() as patch:
        terminal = Terminal(patch, "ascii")
        patch.setattr(sys, "argv", ["collegium", *argv])
        status = main()
        written = terminal.written()
    assert status == (0 if argv[0] in ("plan", "manifest") or "--help" in argv else status)
    assert "Traceback" not in written, written
    assert written


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_up_says_and_lays_out_can_be_shown(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    completion = Completion(num_tokens=3, first_token_s=0.1, total_s=0.2, finish_reason="length")
    with monkeypatch.context() as patch:
        terminal = Terminal(patch, encoding)
        streams.outlive_readers()
        say("starting 你好 \udcff")
        for table in (completion_table(completion, {}, {"wörker-你": {}}), address_table([("gåteway", "h:1", 1)], {})):
            console(sys.stdout).print(table)
        sys.stdout.write("text of a model: 你好 \N{GRINNING FACE} \udcff\n")
        written = terminal.written()
    assert "starting \\u4f60\\u597d" in written and "text of a model: ?? ? ?" in written
    assert "w" in written and os.linesep in written
