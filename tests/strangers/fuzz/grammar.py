"""Messages that no honest peer writes, made from their descriptors: nearly right ones, wild ones, and broken bytes.

Owns how values are drawn; knows no service. All chance comes from the Random that it is given, so that a seed, or
hypothesis, decides everything. Words: values worth trying in fields of a name, such as the digest of the model served.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Words = Mapping[str, Sequence[Any]]
F = FieldDescriptor

_DEPTH = 4  # of messages in messages
_WILD_TEXTS = (
    "",
    "\0",
    "\n" * 50,
    "é" * 1000,
    "\u202e\u200d",
    "a" * 5000,
    "%s%n",
    "../../etc",
    "127.0.0.1:1",
    "-1",
    "\U0001f9d1\u200d\U0001f680",
)
_LENGTHS = (0, 1, 2, 3, 5, 6, 7, 16, 31, 32, 33, 64, 65)
_LONG = 3000  # a run of values, at times


def message(draw: random.Random, kind: Descriptor, words: Words, depth: int = _DEPTH) -> Message:
    """Make a message of a kind: each field is absent, plain or wild, and a oneof has any of its members."""
    made = GetMessageClass(kind)()
    wildness = draw.choice((0.0, 0.1, 0.1, 0.5, 1.0))  # the nearer to right, the deeper it gets
    for field in kind.fields:
        if draw.random() < (0.15 if wildness else 0.1) or (_is_message(field) and depth == 0):
            continue
        _fill(draw, made, field, words, wildness, depth)
    return made


def wire(draw: random.Random, kind: Descriptor, words: Words) -> bytes:
    """Make the bytes of a message, most of them as they should be, the others broken in one of many ways."""
    raw = message(draw, kind, words).SerializeToString()
    return raw if draw.random() < 0.7 else broken(draw, raw)


def broken(draw: random.Random, raw: bytes) -> bytes:
    """Break bytes: bits turned, cut short, cut out, doubled, unknown fields added, or others altogether."""
    how = draw.randrange(7)
    at = draw.randrange(len(raw) + 1)
    if how == 0 and raw:
        turned = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            turned[draw.randrange(len(turned))] ^= 1 << draw.randrange(8)
        return bytes(turned)
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw[:at] + raw[at + draw.randint(1, 8) :]
    if how == 3:
        return raw + raw
    if how == 4:
        return raw + _varint(draw.randrange(1, 2**29) << 3 | draw.choice((0, 1, 2, 3, 4, 5))) + draw.randbytes(9)
    if how == 5:
        return raw[:at] + draw.choice((b"\xff" * 11, b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200)) + raw[at:]
    return draw.randbytes(draw.randrange(64))


def wild_number(draw: random.Random, field_type: int) -> int | float:
    """Draw a number at an edge of its type."""
    if field_type in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return draw.choice((math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38, -3e38, -1.0, 2.0, 1e300))
    low, high = _range(field_type)
    edges = (0, 1, 2, 63, 64, 65, 255, 256, 4095, 4096, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1)
    return min(high, max(low, draw.choice((low, high, high - 1, high // 2, draw.randint(low, high), *edges))))


def _fill(
    draw: random.Random, made: Message, field: FieldDescriptor, words: Words, wildness: float, depth: int
) -> None:
    def one() -> Any:
        if _is_message(field):
            return message(draw, field.message_type, words, depth - 1)
        return _scalar(draw, field, words, draw.random() < wildness)

    if field.is_repeated:
        length = _LONG if draw.random() < 0.02 else draw.choice(_LENGTHS)
        _extend(draw, made, field, words, one, min(length, 4) if _is_message(field) and depth < _DEPTH else length)
    elif _is_message(field):
        getattr(made, field.name).CopyFrom(one())
    else:
        setattr(made, field.name, one())


def _extend(
    draw: random.Random, made: Message, field: FieldDescriptor, words: Words, one: Callable[[], Any], length: int
) -> None:
    held = getattr(made, field.name)
    if _is_message(field) and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        for at in range(min(length, 50)):
            if not _is_message(value):
                held[draw.choice((f"key {at}", ""))] = _scalar(draw, value, words, draw.random() < 0.5)
        return
    # The same few values again and again: long runs cost little to draw.
    few = [one() for _ in range(min(length, 3))]
    for at in range(min(length, 70) if _is_message(field) else length):
        value = few[at % len(few)]
        held.append(value)


def _scalar(draw: random.Random, field: FieldDescriptor, words: Words, is_wild: bool) -> Any:
    kind, known = field.type, words.get(field.name)
    if known and not is_wild and kind != F.TYPE_ENUM:
        return draw.choice(list(known))
    if kind == F.TYPE_BOOL:
        return draw.random() < 0.5
    if kind == F.TYPE_ENUM:
        values = [value.number for value in field.enum_type.values]
        return draw.choice((99, 2**31 - 1, -1)) if is_wild else draw.choice(values)
    if kind == F.TYPE_STRING:
        return draw.choice(_WILD_TEXTS) if is_wild else f"name-{draw.randrange(5)}"
    if kind == F.TYPE_BYTES:
        if is_wild:
            return draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", draw.randbytes(20), b"a" * 5000, b"\0"))
        return draw.choice(("hello", "one two three", "é", "\U0001f600 x")).encode()
    if is_wild:
        return wild_number(draw, kind)
    if kind in (F.TYPE_DOUBLE, F.TYPE_FLOAT):
        return draw.choice((0.0, 0.5, 0.7, 1.0))
    return draw.randrange(9)


def _is_message(field: FieldDescriptor) -> bool:
    return field.message_type is not None


def _range(field_type: int) -> tuple[int, int]:
    if field_type in (F.TYPE_INT32, F.TYPE_SINT32, F.TYPE_SFIXED32):
        return -(2**31), 2**31 - 1
    if field_type in (F.TYPE_INT64, F.TYPE_SINT64, F.TYPE_SFIXED64):
        return -(2**63), 2**63 - 1
    return (0, 2**32 - 1) if field_type in (F.TYPE_UINT32, F.TYPE_FIXED32) else (0, 2**64 - 1)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
