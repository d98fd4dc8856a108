"""A checkpoint whose chat template and tokenizer are hostile, at a gateway process over a router that is not real.

Each conversation names what the template is to do, each text what the tokenizer fails on; whoever asks for it is told
so at once, as the template's or the tokenizer's, and a canary beside it does not notice.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from collegium.cli.child import Child, Command
from collegium.cli.spec import free_address, service_env
from collegium.fabric import rpc
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from tests.fake_router import FakeRouter
from tests.strangers.rigs.attack import REFUSED, SOON_S, at_once, unary_status
from tests.strangers.rigs.calls import OK
from tests.strangers.rigs.canary import Canary
from tests.strangers.rigs.footprint import footprint, is_alive, peak_mb, reset_peak
from tests.strangers.rigs.target import LIMIT_S, RSS_MB, make_checkpoint

# What a conversation can ask of the template, by the content of its only message.
TEMPLATES = {
    "recurse": "{{ again(0) }}",
    "loop": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a gigabyte": "{{ 'x' * 1000000000 }}",
    "doubling": "{% set ns = namespace(t='x') %}{% for _ in range(40) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "a wide column": "{{ '%1000000000d' % 1 }}",
    "a wide field": "{{ '{:>1000000000}'.format(1) }}",
    "centred": "{{ 'x' | center(1000000000) }}",
    "a power": "{{ 9 ** 999999999 }}",
    "a list": "{{ ([0] * 1000000000) | length }}",
    "joined": "{{ (['x'] * 30000000) | join('yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy') }}",
    "its own error": "{{ raise_exception('no') }}",
    "a division": "{{ 1 / 0 }}",
    "nothing of nothing": "{{ messages.nothing.nothing }}",
    "an empty list": "{{ [].pop() }}",
    "no function": "{{ messages() }}",
    "private": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}
SOAKED = {"a wide column", "a wide field", "a list", "joined", "doubling"}  # as others, and slow
SLOWEST_S = 10.0


@dataclass(kw_only=True)
class HostileGateway:
    """A gateway process that reads a hostile checkpoint."""

    child: Child
    stub: Any
    canary: Canary
    lines: list[str]


@contextmanager
def fake_router() -> Iterator[str]:
    """Run a router without a model in a thread of its own; gives its address."""
    loop, router = asyncio.new_event_loop(), FakeRouter()
    thread = threading.Thread(target=loop.run_forever, name="router", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(router.start(), loop).result(SOON_S)
    finally:
        asyncio.run_coroutine_threadsafe(router.stop(), loop).result(SOON_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SOON_S)
        loop.close()


def write_checkpoint(folder: Path) -> Path:
    """Make a checkpoint whose template does what it is told, and whose tokenizer fails on some texts."""
    choices = "".join(f"{{% elif asked == {what!r} %}}{does}" for what, does in TEMPLATES.items())
    made = make_checkpoint(
        folder,
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{% set asked = messages[0]['content'] %}"
        "{% if asked == 'nothing' %}hello" + choices + "{% else %}{{ asked }}{% endif %}",
    )
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    # A panic of the library, for a text of many letters a alone: its engine gives up, and it unwraps the error.
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    (made / "tokenizer.json").unlink()
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    return made


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileGateway]:
    folder = write_checkpoint(tmp_path_factory.mktemp("hostile") / "checkpoint")
    lines: list[str] = []
    address = free_address(set())
    with fake_router() as router:
        argv = (sys.executable, "-m", "gateway", "--bind", address, "--model", str(folder), "--routers", router)
        argv = (*argv, "--log-level", "warning", "--text-limit-s", "1")
        child = Child(Command(name="gateway", argv=argv, env=service_env(1)), lambda name, line: lines.append(line))
        child.start()
        try:
            asyncio.run(asyncio.wait_for(rpc.wait_until_serving(address), LIMIT_S))
            with grpc.insecure_channel(address) as channel:
                canary = Canary([address])
                try:
                    stub = inference_pb2_grpc.InferenceStub(channel)
                    yield HostileGateway(child=child, stub=stub, canary=canary, lines=lines)
                finally:
                    canary.close()
        finally:
            child.send(signal.SIGKILL)
            child.wait(SOON_S)
            child.close()


def chat(content: str) -> pb.GenerateRequest:
    """Ask for the answer to a conversation of one message."""
    message = pb.ChatMessage(role="user", content=content.encode())
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=[message]), stopping=pb.Stopping(max_tokens=2))


def text(content: str) -> pb.GenerateRequest:
    """Ask for the continuation of a text."""
    return pb.GenerateRequest(text=content.encode(), stopping=pb.Stopping(max_tokens=2))


def check_unharmed(gateway: HostileGateway, since: int) -> None:
    """Hold that the process lives, logged no fault of its own, and that the canary was answered."""
    assert is_alive(gateway.child.pid), gateway.lines[-20:]
    assert not [line for line in gateway.lines[since:] if "Traceback" in line], gateway.lines[since:][:40]
    visits = gateway.canary.wait_for(3, LIMIT_S)
    assert not [one.error for one in visits if one.error]


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.soak] if what in SOAKED else []) for what in TEMPLATES]
)
def test_a_template_that_fails_or_does_not_end_is_told_as_the_templates(hostile: HostileGateway, what: str) -> None:
    pid, since = hostile.child.pid, len(hostile.lines)
    reset_peak(pid)
    before = footprint(pid)
    ended = unary_status(lambda: list(hostile.stub.Generate(chat(what), timeout=SOON_S)))
    assert ended in REFUSED, f"{ended}"
    assert "template" in ended.details
    assert len(ended.details) < 1000
    assert peak_mb(pid) - before.rss_mb < RSS_MB
    check_unharmed(hostile, since)
    ended = unary_status(lambda: list(hostile.stub.Generate(chat("hello"), timeout=SOON_S)))
    assert ended == OK, f"the next conversation: {ended}\n" + "\n".join(hostile.lines[since:][:60])


@pytest.mark.parametrize("length", [60, 3000, 6000], ids=["short", "on the loop", "apart"])
def test_a_tokenizer_that_panics_is_told_as_the_tokenizers(hostile: HostileGateway, length: int) -> None:
    since = len(hostile.lines)
    content = " " * (length - 60) + "a" * 59 + "!"
    for call in (
        lambda: list(hostile.stub.Generate(text(content), timeout=SOON_S)),
        lambda: list(hostile.stub.Generate(chat(content), timeout=SOON_S)),
        lambda: hostile.stub.Score(pb.ScoreRequest(text=content.encode()), timeout=SOON_S),
    ):
        ended = unary_status(call)
        assert ended in REFUSED, f"{ended}"
        assert "tokenizer" in ended.details, f"{ended}"
    check_unharmed(hostile, since)
    assert unary_status(lambda: list(hostile.stub.Generate(text("hello"), timeout=SOON_S))) == OK


def test_many_who_ask_for_a_template_that_does_not_end_hold_nobody_else_up(hostile: HostileGateway) -> None:
    since = len(hostile.lines)
    began = hostile.canary.wait_for(1, LIMIT_S)[0].began_s

    def ask(number: int) -> None:
        call = hostile.stub.Generate(chat(("loop", "recurse", "doubling")[number % 3]), timeout=SOON_S)
        if number % 2:
            call.cancel()  # gone before it is told
        else:
            ended = unary_status(lambda: list(call))
            assert ended in REFUSED | {"UNAVAILABLE", "DEADLINE_EXCEEDED"}, f"{ended}"

    at_once(12, ask)
    assert max(one.seconds for one in hostile.canary.visits(began)) < SLOWEST_S
    check_unharmed(hostile, since)
