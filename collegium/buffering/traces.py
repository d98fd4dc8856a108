"""Recorded routing: which experts each token chose, layer by layer, as CSV.

Owns the format: header lines that begin with `#` (the model, and the bytes of an expert of each MoE layer), a line of
column names, then a row per (token, layer, rank). Knows nothing of buffers or of replaying. The format is that of the
public project BigMoeOnEdge, route_trace v1. N rows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

PREFILL = 0
DECODE = 1
COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
_MAGIC = "# route_trace v1"
_REAL = frozenset({"weight"})
_INTS = NDArray[np.int64]
_REMEDY = "give a file that `collegium trace` wrote"


class TraceError(ValueError):
    """A file that is no trace; the message names file, line, column and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What a trace says of its model."""

    model: str
    arch: str
    num_layers: int  # largest layer number plus one: layers without experts leave gaps
    num_experts: int
    top_k: int
    expert_bytes: Mapping[int, int]  # MoE layer -> bytes of one expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace's columns, each [N], in the order of the file."""

    header: TraceHeader
    turn: _INTS  # number of the sequence
    phase: _INTS  # PREFILL or DECODE
    step: _INTS  # position of the token in its turn, prompt included
    layer: _INTS
    slot: _INTS  # rank of the expert in the token's top-k
    expert: _INTS
    weight: NDArray[np.float64]
    residency: _INTS  # 1 where the expert was resident when the trace was recorded
    expert_bytes: _INTS  # bytes read for this row: 0 where resident

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.layer)


class TraceWriter:
    """Writes a trace row by row to a file that its owner opened, and closes."""

    def __init__(
        self,
        file: TextIO,
        *,
        model: str,
        arch: str,
        num_layers: int,
        num_experts: int,
        top_k: int,
        expert_bytes: Sequence[int] | Mapping[int, int],
    ) -> None:
        """Write the header. expert_bytes: bytes of one expert, by MoE layer."""
        self._file = file
        sizes = expert_bytes if isinstance(expert_bytes, Mapping) else dict(enumerate(expert_bytes))
        file.write(f"{_MAGIC}\n# model={_word(model)} arch={_word(arch)} n_layer={num_layers} ")
        file.write(f"n_expert={num_experts} n_expert_used={top_k}\n")
        file.writelines(f"# layer={layer} expert_bytes={size}\n" for layer, size in sizes.items())
        file.write(",".join(COLUMNS) + "\n")

    def write(
        self,
        *,
        turn: int,
        phase: int,
        step: int,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float],
        residency: Sequence[int],
        expert_bytes: Sequence[int],
    ) -> None:
        """Write the choices of one token at one layer, best first: a row for each of the K experts."""
        chosen = zip(experts, weights, residency, expert_bytes, strict=True)
        self._file.writelines(
            f"{turn},{phase},{step},{layer},{slot},{expert},{weight:.6g},{is_resident},{size}\n"
            for slot, (expert, weight, is_resident, size) in enumerate(chosen)
        )


def read_trace(path: Path) -> Trace:
    """Read a whole trace. TraceError where it is none, OSError where it can't be read."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a trace but something that is no text; {_REMEDY}") from error
    head_length, line = _columns_at(path, text)
    header = _read_header(path, text[:head_length])
    body = text[head_length:].partition("\n")[2]
    kinds = np.dtype([(name, np.float64 if name in _REAL else np.int64) for name in COLUMNS])
    if not body.strip():
        raise TraceError(f"{path}: no rows below line {line}; record some tokens")
    try:
        rows = np.loadtxt(io.StringIO(body), delimiter=",", dtype=kinds, comments="#", ndmin=1)
    except ValueError as error:
        raise _first_fault(path, body, line + 1, header) or TraceError(f"{path}: {error}; {_REMEDY}") from error
    if _has_fault(rows, header):
        raise _first_fault(path, body, line + 1, header) or TraceError(f"{path}: rows do not fit the header; {_REMEDY}")
    return Trace(header=header, **{name: np.ascontiguousarray(rows[name]) for name in COLUMNS})


def _columns_at(path: Path, text: str) -> tuple[int, int]:
    """Find the line of column names: its place in the text, its number. TraceError where it is wrong."""
    at = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.startswith("#") and line.strip():
            found = tuple(name.strip() for name in line.split(","))
            if found == COLUMNS:
                return at, number
            if not set(found) & set(COLUMNS):
                raise TraceError(f"{path}:{number}: not a trace; a trace has the columns {','.join(COLUMNS)}")
            wrong = [f"no column {name!r}" for name in COLUMNS if name not in found]
            wrong += [f"an unknown column {name[:40]!r}" for name in found if name not in COLUMNS]
            why = ", ".join(wrong) or "the columns in another order"
            raise TraceError(f"{path}:{number}: {why}; a trace has the columns {','.join(COLUMNS)}")
        at += len(line)
    raise TraceError(f"{path}: not a trace: no line of column names; a trace has the columns {','.join(COLUMNS)}")


def _read_header(path: Path, text: str) -> TraceHeader:
    sizes: dict[int, int] = {}
    about: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        if "layer" in fields:
            layer, size = (_natural(fields.get(name, "")) for name in ("layer", "expert_bytes"))
            if layer is None or size is None:
                raise TraceError(f"{path}:{number}: {line.strip()!r} gives no layer with its expert_bytes; {_REMEDY}")
            sizes[layer] = size
        elif "n_expert" in fields:
            about = fields
    num_layers, num_experts, top_k = (
        _natural(about.get(name, "")) for name in ("n_layer", "n_expert", "n_expert_used")
    )
    if not num_experts or not top_k:
        raise TraceError(f"{path}: the header lacks a line like `# n_layer=48 n_expert=128 n_expert_used=8`; {_REMEDY}")
    if not sizes:
        raise TraceError(f"{path}: the header lacks lines like `# layer=0 expert_bytes=3059712`, one for each layer")
    return TraceHeader(
        model=about.get("model", ""),
        arch=about.get("arch", ""),
        num_layers=max(num_layers or 0, max(sizes) + 1),
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=sizes,
    )


def _has_fault(rows: NDArray[np.void], header: TraceHeader) -> bool:
    is_sized = np.zeros(header.num_layers, dtype=bool)
    is_sized[[layer for layer, size in header.expert_bytes.items() if size]] = True
    layers = rows["layer"]
    return bool(
        any((rows[name] < 0).any() for name in COLUMNS if name not in _REAL)
        or (rows["phase"] > DECODE).any()
        or (rows["expert"] >= header.num_experts).any()
        or (layers >= header.num_layers).any()
        or not is_sized[layers].all()
    )


def _first_fault(path: Path, body: str, first_line: int, header: TraceHeader) -> TraceError | None:
    """Look for the first row that is wrong, slowly, to name its line and column."""
    for number, line in enumerate(body.splitlines(), first_line):
        cells = line.split("#")[0].split(",")
        if not line.split("#")[0].strip():
            continue
        if len(cells) != len(COLUMNS):
            return TraceError(f"{path}:{number}: {len(cells)} columns where there should be {len(COLUMNS)}; {_REMEDY}")
        for name, cell in zip(COLUMNS, cells, strict=True):
            why = _cell_fault(name, cell.strip(), header)
            if why:
                return TraceError(f"{path}:{number}: column {name}: {cell.strip()[:40]!r} {why}")
    return None


def _cell_fault(name: str, cell: str, header: TraceHeader) -> str | None:
    if name in _REAL:
        try:
            float(cell)
        except ValueError:
            return f"is no number; {_REMEDY}"
        return None
    value = _natural(cell)
    if value is None:
        return f"is no number from 0 on; {_REMEDY}"
    if name == "phase" and value > DECODE:
        return f"is no phase; give {PREFILL} for prefill, {DECODE} for decode"
    if name == "expert" and value >= header.num_experts:
        return f"is past the last expert; mend n_expert={header.num_experts} in the header, or the row"
    if name == "layer" and not header.expert_bytes.get(value):
        return f"has no size; add a line `# layer={value} expert_bytes=BYTES` to the header"
    return None


def _natural(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _word(text: str) -> str:
    return re.sub(r"\s+", "_", text.strip()) or "unknown"
