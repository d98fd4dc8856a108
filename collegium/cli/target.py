"""The options with which every command reaches a gateway, those that several share, and how results become JSON.

Owns the flags' names and defaults, which are also read from the environment.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import typer

from collegium.client import Client, RetryPolicy
from collegium.fabric.errors import InvalidArgument

DEFAULT_TARGET = "127.0.0.1:50051"
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

Target = Annotated[
    str, typer.Option("--target", envvar="COLLEGIUM_TARGET", help="Gateways, HOST:PORT, separated by commas.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="COLLEGIUM_API_KEY", help="Key that the gateway asks for.")
]
Tls = Annotated[bool, typer.Option("--tls", help="Speak TLS, trusting the system's authorities.")]
TlsCa = Annotated[
    Path | None, typer.Option("--tls-ca", envvar="COLLEGIUM_TLS_CA", help="Speak TLS, trusting this CA file (PEM).")
]
TimeoutS = Annotated[
    float | None, typer.Option("--timeout-s", min=0.001, help="Limit for the whole call, retries included.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
NumBeams = Annotated[int, typer.Option("--num-beams", help="Above 1: beam search.")]
LengthPenalty = Annotated[
    float | None, typer.Option("--length-penalty", help="Of beam search: length to this power divides a score.")
]
EarlyStopping = Annotated[str, typer.Option("--early-stopping", help='Of beam search: "true", "false" or "never".')]
NoRepeatNgramSize = Annotated[
    int, typer.Option("--no-repeat-ngram-size", help="No run of so many tokens comes twice; 0: any may.")
]
SharedExperts = Annotated[
    str,
    typer.Option(
        "--shared-experts",
        help='Who computes the experts that every token has: "router", or "worker": then they are experts like the '
        "others, which stay in a buffer's slots.",
    ),
]
PromptIds = Annotated[str | None, typer.Option("--prompt-ids", help="Token ids instead of text, such as 1,2,3.")]


def open_client(
    target: str,
    api_key: str | None,
    tls: bool,
    tls_ca: Path | None,
    timeout_s: float | None,
    retry: RetryPolicy | None = None,
) -> Client:
    """Open the SDK's client with the options of a command."""
    return Client(target, api_key=api_key, tls=tls, tls_ca=tls_ca, timeout_s=timeout_s, retry=retry)


def read_ids(text: str | None, field: str = "--prompt-ids") -> list[int] | None:
    """Read 1,2,3; InvalidArgument names the flag."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidArgument(f"{text!r} are no token ids", field=field, remedy="give numbers, such as 1,2,3") from None


def read_shared_experts(text: str) -> bool:
    """Read router or worker: whether workers compute shared experts; InvalidArgument names the flag."""
    if text not in ("router", "worker"):
        raise InvalidArgument(f"{text!r} is unknown", field="--shared-experts", remedy="give router or worker")
    return text == "worker"


def read_early_stopping(text: str) -> bool | Literal["never"]:
    """Read true, false or never; InvalidArgument names the flag."""
    known: Mapping[str, bool | Literal["never"]] = {"true": True, "false": False, "never": "never"}
    if text.lower() not in known:
        raise InvalidArgument(f"{text!r} is unknown", field="--early-stopping", remedy="give true, false or never")
    return known[text.lower()]


def typed(text: str) -> str:
    """Read an argument as the UTF-8 that it is, also where the locale has Python take it for ASCII."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") if has_escapes(text) else text


def has_escapes(text: str) -> bool:
    """Say whether a text holds bytes that its locale could not read."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def read_prompt(text: str | None) -> str | None:
    """Give the prompt; "-" is what stdin holds."""
    if text != "-":
        return None if text is None else typed(text)
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


def print_json(value: Json) -> None:
    """Print one JSON object; numbers that JSON has no word for become null."""
    print_line(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def print_text(text: str) -> None:
    """Print text as it is, at once."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Print one line."""
    print_text(f"{text}\n")


def _plain(value: Json) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Json]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
