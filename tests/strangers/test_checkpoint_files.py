"""The bounded reader: whatever stands in a file's place is read, or refused by one sentence that names it, at once."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.model.checkpoint_files import (
    CONFIG_BYTES,
    MAX_DEPTH,
    CheckpointError,
    parse_json,
    read_json,
    read_text,
    shown,
)
from collegium.model.manifest import ensure_manifest

DEMO = Path(__file__).parents[2] / "models" / "demo-lm"


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, CONFIG_BYTES + 1)


def _listen(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)  # the address is short
    listener.bind(path.name)
    os.chdir(here)
    listener.close()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


INSTEAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (lambda p: p.mkdir(), "is a directory"),
    "a FIFO": (lambda p: os.mkfifo(p), "is a FIFO"),
    "a link to a FIFO": (lambda p: (os.mkfifo(p.with_name("fifo")), p.symlink_to("fifo")), "is a FIFO"),
    "a socket": (_listen, "cannot be read|is a socket"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "a terminal": (lambda p: p.symlink_to("/dev/tty"), "is a device|cannot be read"),
    "a dangling link": (lambda p: p.symlink_to("nowhere"), "is a link to a file that does not exist"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "cannot be read"),
    "nothing": (lambda p: None, "is missing"),
    "too large a file": (_sparse, f"has {CONFIG_BYTES + 1} bytes; at most {CONFIG_BYTES}"),
    "a Git LFS pointer": (lambda p: p.write_bytes(LFS_POINTER), "is a Git LFS pointer.* run `git lfs pull`"),
    "no JSON": (lambda p: p.write_text("{"), "is not JSON"),
    "an empty file": (lambda p: p.touch(), "is not JSON"),
    "a list": (lambda p: p.write_text("[1]"), "is not a JSON object but a list"),
    "a number": (lambda p: p.write_text("1e999"), "is not a JSON object but a number"),
    "no UTF-8": (lambda p: p.write_bytes(b'{"a": "\xff"}'), "is not UTF-8 text"),
    "a byte order mark": (lambda p: p.write_bytes(b"\xef\xbb\xbf{}"), "is not JSON"),
    "two values for one name": (lambda p: p.write_text('{"a": 1, "b": {"k": 1, "k": 2}}'), "k has two values"),
    "lists 100,000 deep": (lambda p: p.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "nested more than"),
    "objects 100,000 deep": (lambda p: p.write_text('{"a":' * 100_000 + "1" + "}" * 100_000), "nested more than"),
    "a little too deep": (lambda p: p.write_text('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)), "nested"),
    "a number of 5,000 digits": (lambda p: p.write_text('{"a": ' + "9" * 5000 + "}"), "is not JSON"),
}


@pytest.mark.parametrize("kind", sorted(INSTEAD))
def test_what_stands_in_the_place_of_a_json_file_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    make, why = INSTEAD[kind]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(CheckpointError, match=why) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300


def test_what_is_within_the_bounds_is_read_as_json_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, true, "é"], "twice": 1, "twice": 1, "deep": ' + "[" * 50 + "]" * 50 + "}")
    read = read_json(path)
    assert (read["a"], read["twice"]) == ([1, 2.5, None, True, "é"], 1)
    (tmp_path / "link").symlink_to(path)  # as the hub's cache lays files out
    assert read_json(tmp_path / "link") == read
    assert read_text(path).startswith('{"a"')


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_git_lfs_pointer_in_the_place_of_any_file_is_told_before_anything_is_started(
    name: str, tmp_path: Path
) -> None:
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        ensure_manifest(tmp_path, out=tmp_path / "m.json")


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,1ae\\ u', max_size=200).map(str.encode))
def test_any_bytes_are_an_object_or_a_checkpoint_error(data: bytes) -> None:
    try:
        assert isinstance(parse_json(data, "config.json"), dict)
    except CheckpointError as error:
        assert str(error).startswith("config.json")
        assert str(error).isprintable()


@given(st.text() | st.integers() | st.none() | st.floats() | st.lists(st.integers()))
def test_a_strangers_name_is_shown_on_one_bounded_line(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) < 1400
