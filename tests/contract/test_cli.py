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
    assert set(score) == {"token_ids", "text", "finish_reason", "logprobs", "perplexity"}
    assert len(score["logprobs"]) == 3
    cluster = json.loads(status.out)
    assert [member["role"] for member in cluster["members"]] == ["gateway", "router"]
    assert cluster["placement_epoch"] == 0
    assert cluster["models"][0]["name"] == "fake-lm"
    assert served.address in listed.out
    assert "placement epoch 0" in listed.out


async def test_a_score_says_over_how_many_tokens_it_is(command: Command) -> None:
    async with rig(FakeRouter()) as served:
        target = ("--target", served.address)
        three, one, as_json, one_as_json = [
            await command("score", *target, "--prompt-ids", ids, *rest)
            for ids, *rest in (("1,2,3",), ("1",), ("1,2,3", "--json"), ("1", "--json"))
        ]
    lines = three.out.splitlines()
    assert lines[0].split() == ["1", "-"]
    assert lines[-1].endswith("over 2 tokens (the first has nothing before it)")
    assert one.out.splitlines()[-1] == "perplexity - over 0 tokens (the first has nothing before it)"
    score = json.loads(as_json.out)
    assert score["logprobs"][0] is None
    assert None not in (*score["logprobs"][1:], score["perplexity"])
    alone = json.loads(one_as_json.out)
    assert (alone["token_ids"], alone["logprobs"], alone["perplexity"]) == ([1], [None], None)


async def test_log_probabilities_are_a_line_per_token_after_the_text(command: Command) -> None:
    async with rig(FakeRouter()) as served:
        argv = ("generate", "--target", served.address, "--prompt-ids", "1,2", "--max-tokens", "3", "--logprobs", "2")
        one, two = await command(*argv), await command(*argv, "-n", "2")
    ids = [str(token_id) for token_id in expected([1, 2], 3)]
    lines = one.out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ids
    assert all(len(line.split()) == 4 for line in lines)
    assert sum(line.split()[:1] == [ids[0]] and len(line.split()) == 4 for line in two.out.splitlines()) == 2


async def test_a_deadline_and_an_interrupt_end_a_line_that_was_begun(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = FakeRouter(next_token=scripted([500] * 4))
    router.hold()
    router.step(2)
    async with rig(router) as served:
        argv = ("generate", "--target", served.address, "--prompt-ids", "1", "--timeout-s", "1")
        late = await command(*argv)

        def interrupt(text: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("collegium.cli.target.print_text", interrupt)
        monkeypatch.setattr("collegium.cli.target.print_line", lambda text: sys.stdout.write(f"{text}\n"))
        router.release()
        interrupted = await command(*argv)
    assert late.status == 1
    assert late.out.endswith("\n") and len(late.out) > 1
    # The client or the gateway may be the first to see it; both say what to do, on one line.
    assert late.err.startswith("collegium: DEADLINE_EXCEEDED: ")
    assert "give more time" in late.err
    assert late.err.count("\n") == 1
    assert (interrupted.status, interrupted.out, interrupted.err) == (130, "\n", "collegium: interrupted\n")


async def test_tls_where_there_is_none_is_told_in_one_line_with_what_to_do() -> None:
    async with rig(FakeRouter()) as served:
        ended = await collegium("status", "--target", served.address, "--tls", "--timeout-s", "2")
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("collegium: UNAVAILABLE")
    assert "leave --tls and --tls-ca out" in ended.err


async def test_a_manifest_is_written_where_it_is_asked_for_and_nothing_else_is_said(
    command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "m.json"
    written = await command("manifest", str(DEMO), "--out", str(out))
    assert (written.status, written.out, written.err) == (0, f"{out}\n", "")
    folder = await command("manifest", str(DEMO), "--out", str(tmp_path))
    assert (folder.status, folder.out) == (1, "")
    assert folder.err == f"collegium: FAILED_PRECONDITION: --out: {tmp_path} is a folder; name a file\n"
    assert os.listdir(tmp_path) == [out.name]


async def test_without_extras_a_command_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    monkeypatch.delitem(sys.modules, "collegium.cli.manifest", raising=False)
    monkeypatch.delitem(sys.modules, "collegium.model.manifest", raising=False)
    ended, helped = await command("manifest", str(DEMO)), await command("--help")
    assert ended.status == 2
    assert "`manifest` needs more than the base package" in ended.err
    assert "pip install '.[all]'" in ended.err
    assert ".[all]" in helped.out


async def test_errors_end_with_their_status_on_stderr_and_nothing_on_stdout(command: Command) -> None:
    async with rig(FakeRouter()) as served:
        target = ("--target", served.address)
        cases = {
            "INVALID_ARGUMENT: --temperature: nan": ("generate", *target, "--prompt", "x", "--temperature", "nan"),
            "INVALID_ARGUMENT: --prompt-ids: token": ("generate", *target, "--prompt-ids", "99999", "--json"),
            "INVALID_ARGUMENT: --prompt-ids: 'a,b'": ("generate", *target, "--prompt-ids", "a,b"),
            "INVALID_ARGUMENT: --max-tokens": ("generate", *target, "--prompt", "x", "--max-tokens=-4"),
            "INVALID_ARGUMENT: --prompt: the text": ("score", *target, "--prompt", os.fsdecode(b"\xff")),
            "INVALID_ARGUMENT: --target: the target is empty": ("status", "--target", ""),
            "NOT_FOUND: --model": ("score", *target, "--prompt", "x", "--model", "other", "--json"),
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
