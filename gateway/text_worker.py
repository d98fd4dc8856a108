"""The process that renders conversations and tokenises long texts for a gateway, one job at a time.

Owns one Tokenizer and the limits on itself: a timer of processor time for each job, which ends the process even inside
a library, and a bound on its memory. Ends with the gateway, whose pipe it reads. text_process.py is the other end.

A message is four bytes of length and that many bytes. A job is JSON: limit_s, max_bytes, and text or turns; or limit_s
and check, to render a trivial conversation. An answer is b"+" and the ids as 32-bit integers, or b"-" and JSON: reason,
code, message, field and remedy of an error; b"-" alone says that there was not enough memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import grpc

from collegium.fabric.errors import CollegiumError
from gateway.tokenizer import Tokenizer

LENGTH = struct.Struct("<I")
OUT_OF_MEMORY = b"-"
_PR_SET_PDEATHSIG = 1


def main(model_dir: Path, memory_bytes: int) -> int:
    """Answer jobs on stdin until it ends. Exit status 3: the tokenizer cannot be loaded."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        tokenizer = Tokenizer.load(model_dir)
    except CollegiumError:
        return 3
    if tokenizer is None:
        return 3
    limit = _address_space() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while (job := _read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, job["limit_s"])
        answer = _answer(tokenizer, job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()
    return 0


def _answer(tokenizer: Tokenizer, job: dict[str, Any]) -> bytes:
    try:
        if "check" in job:
            tokenizer.check_template()
            return b"+"
        if "turns" in job:
            turns = [(role, content) for role, content in job["turns"]]
            token_ids = tokenizer.encode_chat(turns, max_bytes=job["max_bytes"])
        else:
            token_ids = tokenizer.encode(job["text"], job["language"], field=job["field"])
        return b"+" + array("I", token_ids).tobytes()
    except CollegiumError as error:
        if isinstance(error.__cause__, MemoryError):
            return OUT_OF_MEMORY
        return _refusal(error.reason, error.message, error.field, error.remedy, code=error.code)
    except MemoryError:
        return OUT_OF_MEMORY
    except RecursionError:
        return _refusal("CHAT_TEMPLATE", "the model's chat template calls itself too deeply", "chat.messages")
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return _refusal("TOKENIZER", f"the model's tokenizer fails on it: {type(error).__name__}: {error}"[:500])


def _refusal(
    reason: str,
    message: str,
    field: str | None = None,
    remedy: str | None = None,
    *,
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
) -> bytes:
    told = {"reason": reason, "code": code.name, "message": message, "field": field, "remedy": remedy}
    return b"-" + json.dumps(told).encode()


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(LENGTH.size)
    return json.loads(stream.read(LENGTH.unpack(head)[0])) if len(head) == LENGTH.size else None


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
