"""How large each field of balancer.proto may be, wherever its message comes from: a caller, a peer, or Redis.

Owns the table of bounds and the walk over a message. Knows nothing of what the fields mean together: see views for
placements and balancer_svc.validation for what depends on the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from collegium.fabric.errors import shown

MAX_ID = 128  # characters
MAX_ADDRESS = 261  # characters: a host name of 253, brackets, a colon, a port
MAX_HOST = 253  # characters, by RFC 1035
MAX_URL = 2_048  # characters
MAX_TEXT = 4_096  # characters of a sentence for people
MAX_THREADS = 65_536
MAX_WORKERS = 4_096  # that a placement names
MAX_MEMBERS = 8_192
MAX_LAYERS = 1_024
MAX_EXPERTS = 4_096  # of a layer
MAX_EXPERT_BYTES = 2**40
MAX_COUNTERS = 512  # series of one member
MAX_SERIES = 256  # characters of a series' key
MAX_SERIES_IN_ALL = 32_768  # characters of all keys of one member: every view of the cluster carries them
MAX_COUNTER = 2.0**63
MAX_TTL_MS = 24 * 3600 * 1_000
# Redis counts in double precision, which is exact up to 2^53.
MAX_EXACT = 2**53
# Choices of one expert since a router's start: nine years at a million a second. The sum over a layer's MAX_EXPERTS
# experts and both kinds of rows is at most 2^61.
MAX_CHOICES = 2**48
MAX_PARTS = 16  # of a checkpoint's identity: twice as many as there are
MAX_HOMES = 2**20  # of a layer, replicas included


class OutOfBoundsError(ValueError):
    """A field that is too large, too small, or of no known kind. remedy: what it may be."""

    def __init__(self, field: str, what: str, remedy: str) -> None:
        self.field, self.what, self.remedy = field, what, remedy
        super().__init__(f"{field} {what}; {remedy}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A whole number."""

    least: int = 0
    most: int = MAX_EXACT

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        if not self.least <= value <= self.most:
            raise OutOfBoundsError(field, f"is {value}", f"give {self.least} to {self.most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A finite number of either sign."""

    most: float = MAX_COUNTER

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError; NaN is out of every bound."""
        if not abs(value) <= self.most:
            raise OutOfBoundsError(field, f"is {value}", f"give a finite number of at most {self.most:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Printable text, of a form where `form` says so in words and `pattern` as an expression."""

    most: int
    is_needed: bool = False
    pattern: re.Pattern[str] | None = None
    form: str = "printable text"

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        remedy = f"give {self.form} of at most {self.most} characters"
        if len(value) > self.most:
            raise OutOfBoundsError(field, f"has {len(value)} characters", remedy)
        if not value:
            if self.is_needed:
                raise OutOfBoundsError(field, "is empty", remedy)
            return
        if not value.isprintable() or (self.pattern is not None and self.pattern.fullmatch(value) is None):
            raise OutOfBoundsError(field, f"is {shown(value)}", remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A list of whole numbers."""

    most_items: int
    most: int

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        _check_length(field, value, self.most_items)
        if len(value) and max(value) > self.most:
            index = next(i for i, number in enumerate(value) if number > self.most)
            raise OutOfBoundsError(f"{field}[{index}]", f"is {value[index]}", f"give at most {self.most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """A list of texts."""

    most_items: int
    each: Text

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        _check_length(field, value, self.most_items)
        for index, text in enumerate(value):
            self.each.check(f"{field}[{index}]", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Numbers by series."""

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        _check_length(field, value, MAX_COUNTERS)
        if sum(map(len, value)) > MAX_SERIES_IN_ALL:
            remedy = f"give at most {MAX_SERIES_IN_ALL}"
            raise OutOfBoundsError(field, f"has keys of {sum(map(len, value))} characters in all", remedy)
        for key, number in value.items():
            if len(key) > MAX_SERIES or not key.isprintable():
                raise OutOfBoundsError(
                    f"{field}[{shown(key)}]",
                    f"has a key of {len(key)} characters",
                    f"give printable keys of at most {MAX_SERIES} characters",
                )
            Real().check(f"{field}[{shown(key)}]", number)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTexts:
    """Texts by name, names bounded as the texts are."""

    most_items: int
    each: Text

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        _check_length(field, value, self.most_items)
        for name, text in value.items():
            self.each.check(f"{field}, a name in it,", name)
            self.each.check(f"{field}[{shown(name)}]", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A list of messages, each checked by its own row of the table."""

    most_items: int

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        _check_length(field, value, self.most_items)
        for index, message in enumerate(value):
            check(message, f"{field}[{index}].")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A message, checked by its own row of the table; one that is absent is as an empty one."""

    def check(self, field: str, value: Any) -> None:
        """Raise OutOfBoundsError."""
        check(value, f"{field}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """Yes or no: always in bounds."""

    def check(self, field: str, value: Any) -> None:
        """Raise nothing."""


Rule = Number | Real | Text | Numbers | Texts | NamedTexts | Counters | Messages | Nested | Flag

_ADDRESS_PATTERN = re.compile(r"[!-~]+:[0-9]{1,5}")
ID = Text(most=MAX_ID, is_needed=True, form="an id")
_LEASE = Text(most=MAX_ID, form="an id")  # an empty one is a lease that does not exist
ADDRESS = Text(most=MAX_ADDRESS, is_needed=True, pattern=_ADDRESS_PATTERN, form="HOST:PORT")
_URL = Text(most=MAX_URL, form="a URL, or nothing,")
_SENTENCE = Text(most=MAX_TEXT)
_EPOCH = Number()
_STATE, _ROLE = Number(most=4), Number(least=1, most=3)
_TTL = Number(least=1, most=MAX_TTL_MS)
_CHOICES = Numbers(most_items=MAX_EXPERTS, most=MAX_CHOICES)

# By message, every field of it.
BOUNDS: Mapping[str, Mapping[str, Rule]] = {
    "ModelShape": {
        "digest": ID,
        "layers": Messages(most_items=MAX_LAYERS),
        "parts": NamedTexts(most_items=MAX_PARTS, each=Text(most=MAX_ID)),
    },
    "LayerShape": {
        "num_experts": Number(least=1, most=MAX_EXPERTS),
        "expert_bytes": Number(least=1, most=MAX_EXPERT_BYTES),
    },
    "JoinRequest": {
        "role": _ROLE,
        "address": ADDRESS,
        "metrics_url": _URL,
        "num_threads": Number(most=MAX_THREADS),
        "model": Nested(),
        "capacity_bytes": Number(),
        "seen_epoch": _EPOCH,
        "failure_domain": Text(most=MAX_HOST),
    },
    "JoinResponse": {"member_id": ID, "ttl_ms": _TTL},
    "RenewRequest": {
        "member_id": _LEASE,
        "state": _STATE,
        "ready_plan": _EPOCH,
        "counters": Counters(),
        "seen_epoch": _EPOCH,
    },
    "RenewResponse": {"ttl_ms": _TTL},
    "LeaveRequest": {"member_id": _LEASE},
    "LeaveResponse": {},
    "Member": {
        "member_id": ID,
        "role": Number(most=3),
        "address": Text(most=MAX_ADDRESS, pattern=_ADDRESS_PATTERN, form="HOST:PORT"),
        "state": _STATE,
        "metrics_url": _URL,
        "num_threads": Number(most=MAX_THREADS),
        "counters": Counters(),
        "capacity_bytes": Number(),
        "ready_plan": _EPOCH,
        "failure_domain": Text(most=MAX_HOST),
        "seen_epoch": _EPOCH,
        "num_renewals": Number(),
        "joined_unix_ms": Number(),
        "counted_unix_ms": Number(),
    },
    "LayerPlacement": {
        "offsets": Numbers(most_items=MAX_EXPERTS + 1, most=MAX_HOMES),
        "worker_idx": Numbers(most_items=MAX_HOMES, most=MAX_WORKERS - 1),
    },
    "Placement": {
        "epoch": _EPOCH,
        "worker_ids": Texts(most_items=MAX_WORKERS, each=ID),
        "layers": Messages(most_items=MAX_LAYERS),
    },
    "WatchPlacementRequest": {"member_id": _LEASE},
    "WatchPlacementResponse": {
        "placement": Nested(),
        "planned": Nested(),
        "members": Messages(most_items=MAX_MEMBERS),
        "wanted_workers": Number(most=2**32 - 1),
        "balance": Nested(),
    },
    "Evenness": {"min": Real(), "p50": Real(), "mean": Real()},
    "ExpertLoad": {
        "layer": Number(most=MAX_LAYERS - 1),
        "expert": Number(most=MAX_EXPERTS - 1),
        "share": Real(),
    },
    "Balance": {
        "decode": Nested(),
        "prefill": Nested(),
        "num_windows": Number(most=2**32 - 1),
        "since_plan_ms": Number(least=-(2**63)),
        "last_decision": _SENTENCE,
        "moves": Number(),
        "moved_bytes": Number(most=2**63),
        "row_ns": Real(),
        "activation_ns": Real(),
        "is_leader": Flag(),
        "has_memory": Flag(),
        "hottest": Messages(most_items=MAX_EXPERTS),
        "retiring": Texts(most_items=MAX_MEMBERS, each=ID),
    },
    "LayerLoad": {"decode_tokens": _CHOICES, "prefill_tokens": _CHOICES, "activations": _CHOICES},
    "ReportLoadRequest": {"member_id": _LEASE, "layers": Messages(most_items=MAX_LAYERS)},
    "ReportLoadResponse": {},
    "LoadWindow": {
        "unix_ms": Number(),
        "length_ms": Number(most=MAX_TTL_MS),
        "layers": Messages(most_items=MAX_LAYERS),
    },
    "ScaleRequest": {"num_workers": Number(least=1, most=2**32 - 1)},
    "ScaleResponse": {
        "num_workers": Number(most=2**32 - 1),
        "retiring": Texts(most_items=MAX_MEMBERS, each=ID),
    },
    "GetPlacementRequest": {},
    "GetPlacementResponse": {"view": Nested()},
}


def check(message: Message, prefix: str = "") -> None:
    """Raise OutOfBoundsError for the first field of a balancer.proto message that is out of its bounds.

    A message that is absent has no fields. prefix: of the fields' names in the error.
    """
    for name, rule in BOUNDS[message.DESCRIPTOR.name].items():
        if isinstance(rule, Nested) and not message.HasField(name):
            continue
        rule.check(prefix + name, getattr(message, name))


def usable_counters(counters: Mapping[str, float]) -> dict[str, float]:
    """Return the counters that a lease may carry: the first MAX_COUNTERS that are in bounds."""
    usable: dict[str, float] = {}
    left = MAX_SERIES_IN_ALL
    for key, value in counters.items():
        is_usable = len(key) <= min(left, MAX_SERIES) and key.isprintable() and abs(value) <= MAX_COUNTER
        if is_usable and len(usable) < MAX_COUNTERS:
            usable[key] = value
            left -= len(key)
    return usable


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_length(field: str, value: Any, most: int) -> None:
    if len(value) > most:
        raise OutOfBoundsError(field, f"has {len(value)} entries", f"give at most {most}")
