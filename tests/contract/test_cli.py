"""The command line as a user meets it: stdout for data, stderr and exit status for the rest.

One test runs real processes; the others call the same entry point in a thread, which is much quicker.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from collegium.cli.main import main
from collegium.fabric import logs
from gateway.__main__ import main as gateway_main
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter, expected, scripted
from tests.gateway_rig import DEMO, rig

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Ended:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Ended]]:
    """The command, run in this process; one at a time."""

    async def run(*argv: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["collegium", *argv])
        capfd.readouterr()
        status = await asyncio.to_thread(main)
        captured = capfd.readouterr()
        return Ended(status, captured.out, captured.err)

    return run


Command = Callable[..., Awaitable[Ended]]


async def collegium(*argv: str | bytes, stdin: bytes = b"") -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "collegium", *argv),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def test_generate_streams_text_or_prints_one_json_object() -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    script = tokenizer.encode(" Ein Satz über 日本語.")
    async with rig(FakeRouter(next_token=scripted(script))) as served:
        plain, written, sampled = await asyncio.gather(
            collegium("generate", "--target", served.address, "--prompt", "x", "--max-tokens", "50"),
            collegium("generate", "--target", served.address, "--prompt", "-", "--json", stdin="é".encode()),
            collegium(
                *("generate", "--target", served.address, "--prompt-ids", "1,2,3", "--n", "2", "--seed", "5"),
                *("--temperature", "0.5", "--stop", "über", "--logprobs", "1", "--ignore-eos", "--json"),
            ),
        )
    assert (plain.status, plain.out) == (0, " Ein Satz über 日本語.\n")
    assert "tokens (stop)" in plain.err
    completion = json.loads(written.out)
    assert completion["token_ids"] == [*script, 0]
    assert completion["text"] == " Ein Satz über 日本語."
    assert completion["finish_reason"] == "stop"
    assert written.out.count("\n") == 1
    choices = json.loads(sampled.out)
    assert choices["seed"] == 5
    assert [choice["text"] for choice in choices["choices"]] == [" Ein Satz "] * 2
    assert choices["stop_reason"] == "über"
    assert len(choices["logprobs"]) == len(choices["token_ids"])


async def test_a_model_without_a_tokenizer_prints_ids(command: Command, tmp_path: Path) -> None:
    async with rig(FakeRouter(), model_dir=tmp_path) as served:
        plain = await command("generate", "--target", served.address, "--prompt-ids", "1 2", "--max-tokens", "4")
    assert plain.out.split() == [str(token_id) for token_id in expected([1, 2], 4)]


async def test_score_and_status_print_what_they_found(command: Command) -> None:
    async with rig(FakeRouter()) as served:
        scored = await command("score", "--target", served.address, "--prompt-ids", "1,2,3", "--json")
        status = await command("status", "--target", served.address, "--json")
        listed = await command("status", "--target", served.address)
    score = json.loads(scored.out)
    assert set(score) == {"token_ids", "logprobs", "perplexity"}
    assert len(score["logprobs"]) == 3
    cluster = json.loads(status.out)
    assert [member["role"] for member in cluster["members"]] == ["gateway", "router"]
    assert cluster["placement_epoch"] == 0
    assert cluster["models"][0]["name"] == "fake-lm"
    assert served.address in listed.out
    assert "placement epoch 0" in listed.out


async def test_errors_end_with_their_status_on_stderr_and_nothing_on_stdout(command: Command) -> None:
    async with rig(FakeRouter()) as served:
        target = ("--target", served.address)
        cases = {
            "INVALID_ARGUMENT: sampling.temperature": ("generate", *target, "--prompt", "x", "--temperature", "nan"),
            "INVALID_ARGUMENT: token_ids": ("generate", *target, "--prompt-ids", "99999", "--json"),
            "INVALID_ARGUMENT: --prompt-ids": ("generate", *target, "--prompt-ids", "a,b"),
            "INVALID_ARGUMENT: max_tokens": ("generate", *target, "--prompt", "x", "--max-tokens=-4"),
            "INVALID_ARGUMENT: prompt": ("score", *target, "--prompt", os.fsdecode(b"\xff")),
            "NOT_FOUND: model": ("score", *target, "--prompt", "x", "--model", "other", "--json"),
            "UNAVAILABLE": ("status", "--target", "127.0.0.1:1", "--timeout-s", "0.5"),
        }
        found = [await command(*argv) for argv in cases.values()]
    for start, ended in zip(cases, found, strict=True):
        assert ended.err.startswith(f"collegium: {start}"), ended.err
        assert (ended.status, ended.out) == (1, "")
        assert ended.err.count("\n") == 1


async def test_a_wrong_command_line_is_status_2_and_help_names_every_command(command: Command) -> None:
    wrong, unknown, helped = [
        await command(*argv) for argv in (("generate", "--max-tokens", "many"), ("fly",), ("--help",))
    ]
    assert (wrong.status, unknown.status, helped.status) == (2, 2, 0)
    assert all(command in helped.out for command in ("up", "generate", "score", "status", "manifest"))


@pytest.mark.parametrize(
    ("argv", "status", "named"),
    [
        (("--modell", "x"), 2, "--modell"),
        ((), 2, "--model"),
        (("--model", "FOLDER"), 2, "--balancer and --routers"),
        (("--model", "FOLDER", "--routers", "127.0.0.1:1", "--max-requests", "0"), 2, "--max-requests"),
        (("--model", "FOLDER", "--routers", "127.0.0.1:1", "--bind", "USED"), 1, "--bind"),
    ],
    ids=["unknown", "missing", "not fitting", "out of bounds", "port in use"],
)
def test_a_gateway_names_the_setting_that_stops_its_start(
    argv: tuple[str, ...],
    status: int,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logs, "configure", lambda **_: None)  # it takes the process's logging over
    with socket.create_server(("127.0.0.1", 0)) as listener:
        used = f"127.0.0.1:{listener.getsockname()[1]}"
        words = {"FOLDER": str(tmp_path), "USED": used}
        monkeypatch.setattr(sys, "argv", ["gateway", "--metrics-bind=", *(words.get(word, word) for word in argv)])
        try:
            ended = gateway_main()
        except SystemExit as exit_:
            assert isinstance(exit_.code, int)
            ended = exit_.code
    assert ended == status
    captured = capfd.readouterr()
    assert named in captured.err
    assert captured.out == ""
