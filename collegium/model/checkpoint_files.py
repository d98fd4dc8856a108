"""Read the small files of a checkpoint, which strangers made: regular files alone, of bounded size and nesting.

Owns CheckpointError and the one bounded reader of JSON and text for every service. Opening never waits (a FIFO has no
writer), nothing larger than its limit is read, and every refusal is one sentence that names the file. Knows no field
of any file. Imports the standard library alone.
"""

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

CONFIG_BYTES = 4 << 20  # config.json, generation_config.json, chat templates: published ones have some 10 kB
TOKENIZER_BYTES = 256 << 20  # the largest published tokenizer.json has 35 MB
MAX_DEPTH = 64  # of JSON objects and arrays inside each other; published files have fewer than 10
_SHOWN_CHARACTERS = 120
_REFETCH = "fetch the checkpoint again"
_LFS_POINTER = b"version https://git-lfs."  # how the specification has every pointer begin
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class CheckpointError(ValueError):
    """The checkpoint is incomplete or damaged."""


def has_file(path: Path) -> bool:
    """Return True if anything has this name, also what is no file: reading it then says what it is."""
    return os.path.lexists(path)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; links are followed.

    Raises CheckpointError if it is missing, cannot be read, is a directory, a FIFO, a socket or a device, or if Git LFS
    left a pointer in its place.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer and opening a device may do anything.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        why = "is a link to a file that does not exist" if os.path.islink(path) else "is missing"
        raise CheckpointError(f"{path} {why}; fetch the checkpoint again") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise CheckpointError(f"{path} is {kind}, not a file; fetch the checkpoint again")
    file = os.fdopen(descriptor, "rb", buffering=0)
    if _begins_as_pointer(descriptor):
        file.close()
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    return file


def read_bytes(path: Path, *, limit_bytes: int) -> bytes:
    """Read a whole file. Raises CheckpointError as open_file, and if it is larger than the limit."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            _refuse_size(path, size, limit_bytes)
        parts: list[bytes] = []
        num_read = 0
        try:
            while part := file.read(min(1 << 20, limit_bytes + 1 - num_read)):
                parts.append(part)
                num_read += len(part)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if num_read > limit_bytes:  # it grew while it was read
        _refuse_size(path, num_read, limit_bytes)
    return b"".join(parts)


def read_text(path: Path, *, limit_bytes: int = CONFIG_BYTES) -> str:
    """Read a UTF-8 text. Raises CheckpointError as read_bytes, and if it is not UTF-8."""
    try:
        return read_bytes(path, limit_bytes=limit_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path, *, limit_bytes: int = CONFIG_BYTES, remedy: str = _REFETCH) -> dict[str, object]:
    """Read a JSON object. Raises CheckpointError as read_text and parse_json."""
    return parse_json(read_bytes(path, limit_bytes=limit_bytes), f"{path}", remedy)


def parse_json(data: bytes, name: str, remedy: str = _REFETCH) -> dict[str, object]:
    """Parse a JSON object that must be UTF-8, at most MAX_DEPTH deep and without two values for one name.

    `name` begins every message, `remedy` ends it. Raises CheckpointError.
    """
    try:
        value: object = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} cannot be read: it is not UTF-8 text (byte {error.start}); {remedy}") from None
    except RecursionError:
        raise CheckpointError(
            f"{name} cannot be read: its JSON is nested more than {MAX_DEPTH} deep; {remedy}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read: it is not JSON: {shown(error)}; {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object but {kind_of(value)}; {remedy}")
    if not _is_shallow(cast("dict[str, object]", value)):
        raise CheckpointError(f"{name} cannot be read: its JSON is nested more than {MAX_DEPTH} deep; {remedy}")
    return cast("dict[str, object]", value)


def shown(value: object) -> str:
    """Write a stranger's name or value for a message: one printable line of bounded length."""
    text = kind_of(cast(object, value)) if isinstance(value, list | dict) else str(value)
    clipped = text[:_SHOWN_CHARACTERS]
    if not clipped.isprintable():
        clipped = ascii(clipped)[1:-1]
    return clipped if len(text) <= _SHOWN_CHARACTERS else f"{clipped}..."


def shown_value(value: Any) -> str:
    """Write the value of a JSON field for a message, so that text is told from a number; bounded as shown()."""
    return f"the text {shown(repr(value))}" if isinstance(value, str) else shown("null" if value is None else value)


def kind_of(value: object) -> str:
    """Name the JSON type of a value, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def _begins_as_pointer(descriptor: int) -> bool:
    with contextlib.suppress(OSError):  # whoever reads it says so
        return os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER
    return False


def _refuse_size(path: Path, size: int, limit_bytes: int) -> NoReturn:
    raise CheckpointError(
        f"{path} has {size} bytes; at most {limit_bytes} are read of such a file: it is damaged or no file of a "
        "checkpoint"
    )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: dict[str, object] = {}
        for name, value in pairs:
            if name in seen and seen[name] != value:
                raise ValueError(f"{shown(name)} has two values")
            seen[name] = value
    return found


def _is_shallow(value: Mapping[str, object]) -> bool:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below += [child for child in cast("dict[str, object]", one).values() if isinstance(child, dict | list)]
            elif isinstance(one, list):
                below += [child for child in cast("list[object]", one) if isinstance(child, dict | list)]
        if not below:
            return True
        level = below
    return False
