"""Lines of text that fit: numbers in few characters, tables that lose columns and rows, lines that lose pieces.

Owns widths. Knows nothing of clusters. Pure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

_GAP = 2
_LABEL = 10
_HEADER = "bold reverse"
_DIM = "dim"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table. rank: columns of the highest go first where there is no room; 0 stays.

    least: characters that it has whatever the cells, so that columns do not come and go with the numbers.
    """

    title: str
    cells: Sequence[str | Text]
    rank: int = 0
    side: Literal["left", "right"] = "right"
    least: int = 0

    @property
    def width(self) -> int:
        """Characters of the widest cell."""
        return max(self.least, *map(_width, (self.title, *self.cells)))


def table(columns: Sequence[Column], width: int, limit: int | None = None, more: str = "") -> list[Text]:
    """Write a header and rows, at most `limit` lines in all; rows that are cut are counted in the last line.

    more: what to add there, after "and N more".
    """
    kept = _fit(columns, width)
    num_rows = len(columns[0].cells)
    room = num_rows if limit is None else max(0, limit - 1)
    num_shown = num_rows if num_rows <= room else max(0, room - 1)
    lines = [_row([column.title for column in kept], kept, width, _HEADER)]
    lines += [_row([column.cells[at] for column in kept], kept, width) for at in range(num_shown)]
    if num_shown < num_rows:
        lines.append(line(f"and {num_rows - num_shown} more{more}", width, _DIM))
    return lines[:limit]


def natural_width(columns: Sequence[Column]) -> int:
    """Give the width at which no column is lost."""
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def line(text: str, width: int, style: str | Style = "") -> Text:
    """Write one line, cut with an ellipsis."""
    made = Text(printable(text), style=style, no_wrap=True, end="")
    made.truncate(width, overflow="ellipsis")
    return made


def wrapped(label: str, text: str, width: int, num_lines: int) -> list[Text]:
    """Write a label and a text, on at most so many lines."""
    room = max(1, width - _LABEL)
    words = textwrap.wrap(printable(text), room, max_lines=num_lines, placeholder=" …")
    return [pieces(label if at == 0 else "", [part], width) for at, part in enumerate(words)]


def pieces(label: str, parts: Sequence[str | Text], width: int) -> Text:
    """Write a label and what is said of it; parts that do not fit are left out, the first of them and all after it."""
    made = Text(f"{label:<{_LABEL}}", style="", no_wrap=True, end="")
    made.stylize("bold", 0, len(label))
    for at, part in enumerate(parts):
        gap = "" if at == 0 else "   "
        if made.cell_len + len(gap) + _width(part) > width:
            break
        made.append(gap)
        made.append_text(part if isinstance(part, Text) else Text(printable(part)))
    made.truncate(width, overflow="ellipsis")
    return made


def beside(left: Sequence[Text], right: Sequence[Text], left_width: int) -> list[Text]:
    """Put two blocks of lines beside each other."""
    lines: list[Text] = []
    for at in range(max(len(left), len(right))):
        made = left[at].copy() if at < len(left) else Text("", no_wrap=True, end="")
        if at < len(right):
            made.append(" " * (left_width + _GAP - made.cell_len))
            made.append_text(right[at])
        lines.append(made)
    return lines


def share_out(room: int, wants: Sequence[int], leasts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Share lines out among blocks: first each its least, in order, then by weight until all have what they want.

    A block whose least does not fit gets none.
    """
    given: list[int] = []
    for want, least in zip(wants, leasts, strict=True):
        lines = min(want, least)
        given.append(lines if lines <= room else 0)
        room -= given[-1]
    while room > 0:
        open_ = [at for at, lines in enumerate(given) if lines and lines < wants[at]]
        if not open_:
            break
        given[min(open_, key=lambda at: given[at] / weights[at])] += 1
        room -= 1
    return given


def printable(text: str) -> str:
    """Replace what could move a cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def number(value: float | None) -> str:
    """Write a rate or a count in up to five characters."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value < 9.95:
        return f"{value:.1f}"
    for unit in ("", "k", "M", "G"):
        if value < 99.95 and unit:
            return f"{value:.1f}{unit}"
        if value < 999.5:
            return f"{value:.0f}{unit}"
        value /= 1e3
    return f"{value:.0f}T"


def whole(value: float | None) -> str:
    """Write a count of things."""
    return "-" if value is None else f"{value:.0f}" if value < 1e5 else number(value)


def size(value: float | None) -> str:
    """Write bytes in up to seven characters."""
    if value is None:
        return "-"
    for unit in _SIZES[:-1]:
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.0f} {_SIZES[-1]}"


def percent(share: float | None, digits: int | None = None) -> str:
    """Write a share, with so many digits behind the point; None: as many as there are five characters for."""
    if share is None:
        return "-"
    return f"{100 * share:.{int(0 < share < 0.0995) if digits is None else digits}f} %"


def age(seconds: float | None) -> str:
    """Write a time that has passed, in its largest unit."""
    if seconds is None:
        return "-"
    for unit, length_s, last in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < last * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def bar(share: float | None, width: int, *, is_ascii: bool) -> str:
    """Draw a share as a bar of up to `width` characters."""
    eighths = round(8 * width * min(1.0, max(0.0, share or 0.0)))
    full, rest = divmod(eighths, 8)
    if is_ascii:
        return ("#" * (full + (rest >= 4))).ljust(width)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def course(values: Sequence[float], width: int) -> str:
    """Draw the newest values as a row of blocks, the highest of them as the highest block."""
    newest = values[-width:] if width > 0 else ()
    top = max(newest, default=0.0)
    return "".join(_BLOCKS[round(8 * value / top)] if top else _BLOCKS[0] for value in newest)


def _fit(columns: Sequence[Column], width: int) -> list[Column]:
    kept = list(columns)
    while natural_width(kept) > width and (worst := max(column.rank for column in kept)):
        kept = [column for column in kept if column.rank != worst]
    return kept


def _row(cells: Sequence[str | Text], columns: Sequence[Column], width: int, style: str = "") -> Text:
    made = Text("", style=style, no_wrap=True, end="")
    for at, (cell, column) in enumerate(zip(cells, columns, strict=True)):
        if at:
            made.append(" " * _GAP)
        pad = " " * (column.width - _width(cell))
        made.append(pad if column.side == "right" else "")
        made.append_text(cell if isinstance(cell, Text) else Text(printable(cell)))
        made.append(pad if column.side == "left" else "")
    if style:
        made.append(" " * max(0, width - made.cell_len))
    else:
        made.rstrip()
    made.truncate(width, overflow="ellipsis")
    return made


def _width(cell: str | Text) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(printable(cell))
