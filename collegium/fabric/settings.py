"""Settings: frozen dataclasses whose fields name their flag, environment variable, default and bounds.

Flag beats environment beats default. An unknown flag or an unreadable value stops the start and names itself; nothing
is read after the start. Knows no service's own settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from collegium.fabric.bounds import MAX_THREADS
from collegium.fabric.byte_size import ByteSize, MemoryBudget
from collegium.fabric.errors import SettingsError

__all__ = [
    "ByteSize",
    "Described",
    "MemoryBudget",
    "ServiceSettings",
    "describe",
    "parse",
    "read",
    "render_help",
    "setting",
]

T = TypeVar("T")
_KEY = "collegium.setting"
_MISSING = dataclasses.MISSING
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    help: str
    env: str | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    secret: bool = False


@overload
def setting(
    help: str,
    *,
    default: T,
    env: str | None = None,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    secret: bool = False,
) -> T: ...
@overload
def setting(
    help: str,
    *,
    env: str | None = None,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    secret: bool = False,
) -> Any: ...  # as dataclasses.field: a required field has no value to take its type from
def setting(
    help: str,
    *,
    default: object = _MISSING,
    env: str | None = None,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    secret: bool = False,
) -> object:
    """Declare one field of a settings dataclass; without a default it must be given.

    env: name of its environment variable instead of COLLEGIUM_<NAME>. A secret's value is never repeated in a message.
    """
    meta = _Setting(help=help, env=env, choices=choices, at_least=at_least, at_most=at_most, unit=unit, secret=secret)
    return dataclasses.field(default=default, metadata={_KEY: meta})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """What every service takes."""

    bind: str = setting("address to listen on, HOST:PORT; port 0 chooses one", default="127.0.0.1:0")
    advertise: str = setting("address that others reach this process at; empty: the bound one", default="")
    balancer: str = setting("address of the balancer, HOST:PORT; empty: none", default="")
    balancer_wait_s: float = setting(
        "longest wait for a balancer at the start, in seconds; then the process ends", default=30.0, at_least=0.0
    )
    health_bind: str = setting(
        "address for probes, HOST:PORT: plaintext grpc.health.v1, `live` and readiness; empty: none", default=""
    )
    metrics_bind: str = setting("address of the metrics page, HOST:PORT; empty: none", default="127.0.0.1:0")
    metrics_connections: int = setting(
        "connections to the metrics page at once; one more cuts the oldest", default=16, at_least=1, at_most=1024
    )
    max_connections: int = setting(
        "connections to the gRPC port at once; gRPC closes one more and does not count it; 0: half of the descriptors "
        "that the process may open",
        default=0,
        at_least=0,
        at_most=1_000_000,
    )
    max_streams: int = setting(
        "calls at once on one connection to the gRPC port; a client keeps more waiting, so that none is refused",
        default=4096,
        at_least=1,
        at_most=1_000_000,
    )
    metrics_prefix: str = setting(
        "names on the metrics page; vllm: those that vLLM has too as vLLM writes them",
        default="collegium",
        choices=("collegium", "vllm"),
    )
    log_level: str = setting(
        "least level that is logged", default="info", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting("form of log lines on stderr", default="text", choices=("text", "json"))
    otlp_endpoint: str = setting(
        "where traces and metrics go by OTLP over gRPC, http://HOST:PORT; empty: nowhere",
        default="",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    otlp_metrics_s: float = setting(
        "how often metrics go to the OTLP endpoint; 0: never", default=15.0, at_least=0.0, unit="S"
    )
    trace_ratio: float = setting("share of requests that are traced", default=0.01, at_least=0.0, at_most=1.0)
    threads: int = setting("compute threads; 0: as many as there are cores", default=0, at_least=0, at_most=MAX_THREADS)


S = TypeVar("S")


def parse(cls: type[S], argv: Sequence[str] | None, *, prog: str, env: Mapping[str, str] = os.environ) -> S:
    """Read settings from flags (None: the process's own) and environment.

    Prints the help and exits 0 on --help; prints what is wrong and exits 2 where something is.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "--help" in given or "-h" in given:
        sys.stdout.write(render_help(cls, prog=prog))
        raise SystemExit(0)
    try:
        return read(cls, given, env)
    except SettingsError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        raise SystemExit(2) from None


def read(cls: type[S], argv: Sequence[str], env: Mapping[str, str]) -> S:
    """Read settings from flags and environment; SettingsError names the setting, the value and the remedy."""
    fields = _fields(cls)
    flags = _flags(argv, fields)
    values: dict[str, object] = {}
    for name, (field, hint) in fields.items():
        meta = _meta(field)
        source, text = f"--{_kebab(name)}", flags.get(name)
        if text is None and env.get(_env_name(name, meta), "") != "":
            source, text = _env_name(name, meta), env[_env_name(name, meta)]
        if text is not None:
            values[name] = _read_value(text, hint, meta, source)
        elif field.default is _MISSING and field.default_factory is _MISSING:
            raise SettingsError(f"--{_kebab(name)} is missing; give it, or set {_env_name(name, meta)}: {meta.help}")
    return cls(**values)


def render_help(cls: type[object], *, prog: str) -> str:
    """Write the help: every flag with its variable, bounds and default."""
    lines = [f"usage: {prog} [--FLAG VALUE ...]", ""]
    for name, (field, hint) in _fields(cls).items():
        meta = _meta(field)
        facts = [f"${_env_name(name, meta)}"]
        if meta.choices:
            facts.append("one of " + "|".join(meta.choices))
        default = field.default
        facts.append("required" if default is _MISSING else f"default {_written(default)}")
        shown = "" if hint is bool else f" {meta.unit or _type_name(hint)}"
        lines += [f"  --{_kebab(name)}{shown}", f"        {meta.help} ({'; '.join(facts)})"]
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One setting as documents show it; default: as text, "none" or "required"."""

    flag: str
    variable: str
    default: str
    bounds: str
    help: str


def describe(cls: type[object]) -> list[Described]:
    """Return all settings of a class, in its order."""
    found: list[Described] = []
    for name, (field, hint) in _fields(cls).items():
        meta = _meta(field)
        default = field.default
        bounds = [
            f"{word} {ByteSize(int(bound)) if hint is ByteSize else f'{bound:g}'}"
            for word, bound in (("at least", meta.at_least), ("at most", meta.at_most))
            if bound is not None
        ]
        bounds += [f"one of {', '.join(meta.choices)}"] if meta.choices else []
        unit = "" if hint is bool else meta.unit or _type_name(hint)
        found.append(
            Described(
                flag=f"--{_kebab(name)} {unit}".rstrip(),
                variable=_env_name(name, meta),
                default="required"
                if default is _MISSING
                else "none"
                if default in (None, "", ())
                else _written(default),
                bounds=", ".join(bounds),
                help=meta.help,
            )
        )
    return found


def _fields(cls: type[object]) -> dict[str, tuple[dataclasses.Field[object], object]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]


def _meta(field: dataclasses.Field[object]) -> _Setting:
    return field.metadata.get(_KEY) or _Setting(help="")


def _flags(argv: Sequence[str], fields: Mapping[str, tuple[dataclasses.Field[object], object]]) -> dict[str, str]:
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.removeprefix("no_")
        if not flag.startswith("--") or (name not in fields and not _is_bool(fields, negated)):
            raise SettingsError(_unknown(word, fields))
        if name not in fields:
            name, has_value, value = negated, "=", "false"
        elif not has_value and _is_bool(fields, name):
            value = "true"
        elif not has_value:
            if not rest or rest[0].startswith("--"):
                raise SettingsError(f"{flag} needs a value: {_meta(fields[name][0]).help}")
            value = rest.pop(0)
        flags[name] = value
    return flags


def _is_bool(fields: Mapping[str, tuple[dataclasses.Field[object], object]], name: str) -> bool:
    return name in fields and fields[name][1] is bool


def _unknown(word: str, fields: Mapping[str, object]) -> str:
    flag = word.partition("=")[0]
    # Without the dashes: they are alike in all, and made strangers close.
    near = difflib.get_close_matches(flag.lstrip("-"), [_kebab(name) for name in fields], n=1)
    hint = f"did you mean --{near[0]}? " if near else ""
    return f"{flag} is not a setting; {hint}--help lists them all"


def _read_value(text: str, hint: object, meta: _Setting, source: str) -> object:
    shown = "(not shown)" if meta.secret else repr(text)
    try:
        value = _convert(text, hint)
        _check(value, meta)
    except ValueError as error:
        raise SettingsError(f"{source}={shown} cannot be used: {error}") from None
    return value


def _convert(text: str, hint: object) -> object:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if text.lower() in ("", "none") else _convert(text, inner)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_convert(part.strip(), item) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in _WORDS:
            raise ValueError("give true or false")
        return _WORDS[text.lower()]
    if hint is int:
        if re.fullmatch(r"[+-]?\d+", text) is None:
            raise ValueError("give a whole number")
        return int(text)
    if hint is float:
        return _finite(text)
    if hint is ByteSize:
        return ByteSize.parse(text)
    if hint is MemoryBudget:
        return MemoryBudget.parse(text)
    if hint is Path:
        try:
            return Path(text).expanduser()
        except RuntimeError:  # no HOME, and no such user
            raise ValueError("there is no home for its ~; give the whole path") from None
    if hint is str:
        return text
    raise TypeError(f"settings do not know the type {hint!r}")


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError("give a number") from None
    if not math.isfinite(number):
        raise ValueError("give a finite number")
    return number


def _check(value: object, meta: _Setting) -> None:
    if meta.choices and value is not None and str(value) not in meta.choices:
        raise ValueError(f"give one of {', '.join(meta.choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if meta.at_least is not None and value < meta.at_least:
            raise ValueError(f"give at least {meta.at_least:g}")
        if meta.at_most is not None and value > meta.at_most:
            raise ValueError(f"give at most {meta.at_most:g}")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _env_name(name: str, meta: _Setting) -> str:
    return meta.env or f"COLLEGIUM_{name.upper()}"


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in typing.cast("tuple[object, ...]", value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) or repr("")


def _type_name(hint: object) -> str:
    names = {str: "TEXT", int: "N", float: "X", Path: "PATH", ByteSize: "BYTES", MemoryBudget: "BYTES|PERCENT"}
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and part in names:
            return names[part]
    return "VALUE"
