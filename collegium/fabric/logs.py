"""Structured logs on stderr: an event, then its fields, as text or as one JSON object per line.

Owns the form of a line and where it goes. stdout is for data and never touched. Prompts, answers and secrets are never
logged; what is known of the request at hand is added to every line that is written for it.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys
from collections.abc import Mapping

_FIELDS = "collegium_fields"
_ROOT = "collegium"
_bound: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar("log fields", default={})  # noqa: B039


class Logger:
    """Writes events with fields: `logger.info("joined", worker_id="w1")`."""

    __slots__ = ("_inner",)

    def __init__(self, inner: logging.Logger) -> None:
        self._inner = inner

    def debug(self, event: str, **fields: object) -> None:
        """Log what helps only who reads the source."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log a change of state."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log what is wrong but served around."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log what cost somebody an answer."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, fields, exc_info=True)

    def is_enabled_for(self, level: str) -> bool:
        """Say whether a level is logged, where making the fields costs something."""
        return self._inner.isEnabledFor(logging.getLevelNamesMapping()[level.upper()])

    def _write(self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool = False) -> None:
        if self._inner.isEnabledFor(level):
            extra = {_FIELDS: {**fields, **_bound.get()}}
            self._inner.log(level, event, exc_info=exc_info, extra=extra, stacklevel=3)


def bind(**fields: object) -> None:
    """Add fields, such as request_id, to every line of the rest of this task; nothing is to be undone when it ends."""
    _bound.set({**_bound.get(), **fields})


def get(name: str) -> Logger:
    """Give the logger of one part, such as "router" or "fabric.leases"."""
    return Logger(logging.getLogger(f"{_ROOT}.{name}"))


def configure(*, level: str = "info", form: str = "text", service: str = "") -> None:
    """Send all logs of this process, libraries' warnings included, to stderr in one form ("text" or "json")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if form == "json" else _TextFormatter(service))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(level.upper())


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        name = record.name.removeprefix(f"{_ROOT}.")
        head = [time, record.levelname, f"{self._service}/{name}" if self._service not in ("", name) else name]
        fields = [f"{key}={_shown(value)}" for key, value in _fields_of(record).items()]
        line = " ".join([*head, record.getMessage(), *fields])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": stamp,
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name.removeprefix(f"{_ROOT}."),
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in _fields_of(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    return getattr(record, _FIELDS, {})


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text) if text == "" or any(c.isspace() or c in '"=' for c in text) else text
