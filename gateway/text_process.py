"""A process that renders conversations and tokenises long texts, and that can be ended when it takes too long.

Owns the process (text_worker.py): it is started at the first job, jobs wait in line for it, and it is ended, to be
started anew for the next one, when a job takes more processor time or memory than it may or when its caller has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import collegium
from collegium.fabric import logs
from collegium.fabric.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from gateway.text_worker import LENGTH, OUT_OF_MEMORY

# On a busy machine a second of processor time takes longer: only after so many times the limit is the process ended
# from outside.
_WALL_FACTOR = 10
# Prompts that wait may take this share of what one at work may.
_WAITING_SHARE = 4
# A job whose caller has gone may end by itself within this time, which costs less than another process.
_GRACE_S = 0.1
_DYING_S = 2.0  # from the end of its pipes to its own
_ROOT = str(Path(collegium.__file__).resolve().parent.parent)
_log = logs.get("gateway.texts")


class TextProcess:
    """One process and the line before it; owned by the event loop.

    limit_s: processor time for a job, and as much again for each MiB of it. memory_bytes: what it may take beyond the
    loaded tokenizer.
    """

    def __init__(self, model_dir: Path, *, limit_s: float, memory_bytes: int) -> None:
        self._model_dir = model_dir
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._line = asyncio.Lock()
        self._waiting_bytes = 0  # of jobs in the line and at work
        self._process: asyncio.subprocess.Process | None = None
        self._ending: set[asyncio.Future[int]] = set()
        self.num_refusals = 0

    async def encode(
        self,
        field: str,
        *,
        text: str = "",
        turns: Sequence[tuple[str, str]] = (),
        max_bytes: int,
        language: str = "",
    ) -> Sequence[int]:
        """Return the ids of a text, or of a conversation where there are turns.

        language: as Tokenizer.encode has it. max_bytes: the largest text that is tokenised. Raises InvalidArgument
        naming the field, FailedPrecondition if the checkpoint's chat template is broken, or ResourceExhausted.
        """
        prompt: dict[str, object] = {"turns": turns} if turns else {"text": text, "language": language, "field": field}
        num_chars = len(text) + sum(len(role) + len(content) for role, content in turns)
        limit_s = self._limit_s * (1 + num_chars / 2**20)
        job = json.dumps(prompt | {"limit_s": limit_s, "max_bytes": max_bytes}, ensure_ascii=False).encode()
        with self._waiting(len(job)):
            answer = await self._in_turn(job, limit_s)
        if isinstance(answer, str):
            self.num_refusals += 1
            raise self._too_much(field, answer, limit_s)
        if answer[:1] == b"-":
            raise _refused("chat.messages" if turns else field, json.loads(answer[1:]))
        ids = array("I")
        ids.frombytes(answer[1:])
        return ids.tolist()

    @contextlib.contextmanager
    def _waiting(self, num_bytes: int) -> Iterator[None]:
        limit = self._memory_bytes // _WAITING_SHARE
        if self._waiting_bytes and self._waiting_bytes + num_bytes > limit:
            self.num_refusals += 1
            raise ResourceExhausted(
                f"the gateway is full: prompts of {self._waiting_bytes} bytes wait to be tokenised, limit {limit}",
                reason="TEXTS_EXHAUSTED",
                remedy="try again, or at another gateway",
                retry_after_s=self._limit_s,
            )
        self._waiting_bytes += num_bytes
        try:
            yield
        finally:
            self._waiting_bytes -= num_bytes

    async def _in_turn(self, job: bytes, limit_s: float) -> bytes | str:
        async with self._line:
            exchange = asyncio.ensure_future(self._exchange(LENGTH.pack(len(job)) + job, limit_s * _WALL_FACTOR))
            try:
                return await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait((exchange,), timeout=_GRACE_S)
                if not exchange.done():
                    self._kill()
                    exchange.cancel()
                await asyncio.gather(exchange, return_exceptions=True)
                raise

    async def template_fault(self) -> str:
        """Render a trivial conversation; return what is wrong with the chat template, "" if it can be rendered.

        Starts the process, for which the first job need not wait then.
        """
        job = json.dumps({"check": True, "limit_s": self._limit_s}).encode()
        try:
            answer = await self._in_turn(job, self._limit_s)
        except Unavailable as error:
            return error.message
        if isinstance(answer, str):
            return f"it takes more than {self._limit(answer, self._limit_s)} for one short message"
        return json.loads(answer[1:])["message"] if answer[:1] == b"-" else ""

    async def close(self) -> None:
        """End the process."""
        async with self._line:
            self._kill()
            await asyncio.gather(*self._ending)

    async def _exchange(self, job: bytes, wall_s: float) -> bytes | str:
        """Give the process a job; returns its answer, or what it had too little of: "time" or "memory"."""
        # A process may die of what it did before, or of something outside: what dies twice dies of this job.
        return await self._attempt(job, wall_s) or await self._attempt(job, wall_s) or "memory"

    async def _attempt(self, job: bytes, wall_s: float) -> bytes | str:
        """As _exchange; "" if the process has died of something else than its time limit."""
        process = self._process = await self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(wall_s):
                process.stdin.write(job)
                await process.stdin.drain()
                (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
                answer = await process.stdout.readexactly(length)
        except TimeoutError:
            self._kill()
            return "time"
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):  # uvloop's own, of a pipe that has closed
            # Before anything is sent to it: asyncio's own processes lose their status if a signal finds them dead.
            try:
                async with asyncio.timeout(_DYING_S):
                    status = await process.wait()
            except TimeoutError:  # it has closed its pipes, and lives
                process.kill()
                status = await process.wait()
            if status == 3:
                raise Unavailable(
                    "the checkpoint's tokenizer could not be loaded again; its files have changed or are gone",
                    reason="TOKENIZER_GONE",
                    retry_after_s=1.0,
                ) from None
            if status == -signal.SIGPROF:
                return "time"
            _log.warning("a process that renders and tokenises has died", status=status)
            return ""
        if answer == OUT_OF_MEMORY:
            self._kill()  # what is left of its memory is in pieces
            return "memory"
        return answer

    async def _running(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is not None and process.returncode is None and process.stdin and not process.stdin.is_closing():
            return process
        env = os.environ | {"PYTHONPATH": _ROOT, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.text_worker", str(self._model_dir), str(self._memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env,
            start_new_session=True,  # signals of a terminal are for the gateway
        )

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            ending = asyncio.ensure_future(process.wait())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def _limit(self, what: str, limit_s: float) -> str:
        return f"{limit_s:.3g} s of processor time" if what == "time" else f"{self._memory_bytes / 2**20:.0f} MiB"

    def _too_much(self, field: str, what: str, limit_s: float) -> InvalidArgument:
        who = "the model's chat template" if field == "chat" else "the model's tokenizer"
        limit = self._limit(what, limit_s)
        _log.warning("a prompt was given up", field=field, why=what, limit=limit)
        return InvalidArgument(
            f"{who} takes more than {limit} for it",
            field="chat.messages" if field == "chat" else field,
            remedy="shorten it; the gateway's --text-limit-s and --text-memory set the limits",
            reason="CHAT_TEMPLATE" if field == "chat" else "TOKENIZER",
        )


def _refused(field: str, told: dict[str, str | None]) -> InvalidArgument | FailedPrecondition:
    kind = FailedPrecondition if told["code"] == FailedPrecondition.code.name else InvalidArgument
    return kind(
        told["message"] or "it was refused without a reason",
        field=told["field"] or field,
        remedy=told["remedy"] or "send token_ids, or another text",
        reason=told["reason"] or "",
    )
