"""One forward pass: which sequences compute how many rows of it.

Owns nothing: a step is a value that the scheduler forms and everybody else reads. Its rows are packed in one batch,
those of decoding sequences first, then chunks of prompts.
"""

import itertools
from dataclasses import dataclass

from router_svc.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence's part of a step: compute `num_rows` tokens from `begin` on."""

    sequence: Sequence
    begin: int
    num_rows: int
    encodes: bool = False  # whether its source is encoded first
    beam: int = 0  # which of its sequence's tables

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.begin + self.num_rows

    @property
    def blocks(self) -> list[int]:
        """KV blocks of the sequence, or of the beam."""
        return self.sequence.blocks if self.sequence.beams is None else self.sequence.tables[self.beam]

    @property
    def token_ids(self) -> list[int]:
        """The tokens that are computed."""
        sequence = self.sequence
        if sequence.beams is None or not sequence.beams.beams:
            return sequence.tokens(self.begin, self.end)
        return [*sequence.prompt_ids, *sequence.beams.beams[self.beam].tokens.token_ids][self.begin : self.end]

    @property
    def source_blocks(self) -> list[int]:
        """KV blocks of its source."""
        return self.sequence.source_blocks

    @property
    def num_source(self) -> int:
        """Positions of its source."""
        return len(self.sequence.source_ids)

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be drawn after this step."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass: decode rows first, then chunks."""

    decodes: tuple[Row, ...]
    chunks: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All parts in the order of the packed batch."""
        return self.decodes + self.chunks

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch."""
        return len(self.decodes) + sum(row.num_rows for row in self.chunks)

    @property
    def num_source_rows(self) -> int:
        """Rows of the sources that are encoded first."""
        return sum(row.num_source for row in self.rows if row.encodes)

    @property
    def kind(self) -> str:
        """What it holds: "decode", "prefill" or "mixed"."""
        return "mixed" if self.decodes and self.chunks else "decode" if self.decodes else "prefill"

    @property
    def num_sequences(self) -> int:
        """Whose rows there are."""
        return len({id(row.sequence) for row in self.rows})

    def halves(self) -> "tuple[Step, Step]":
        """Part the sequences into two steps of about as many each. Needs two sequences or more."""
        rows, num_decodes = self.rows, len(self.decodes)
        borders = [at for at in range(1, len(rows)) if rows[at].sequence is not rows[at - 1].sequence]
        middle = min(borders, key=lambda at: abs(at - len(rows) // 2))
        return (
            Step(decodes=self.decodes[:middle], chunks=self.chunks[: max(0, middle - num_decodes)]),
            Step(decodes=self.decodes[middle:], chunks=self.chunks[max(0, middle - num_decodes) :]),
        )

    def split(self, num_parts: int) -> "list[Step]":
        """Part the packed batch into steps of as many rows each as can be, in its order; a chunk may be parted.

        Needs at least as many rows as parts. A later part of a chunk attends to what an earlier one stores.
        """
        bounds = [self.num_rows * part // num_parts for part in range(num_parts + 1)]
        decodes: list[list[Row]] = [[] for _ in range(num_parts)]
        chunks: list[list[Row]] = [[] for _ in range(num_parts)]
        at = 0
        for idx, row in enumerate(self.rows):
            for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
                first, last = max(begin, at), min(end, at + row.num_rows)
                if first < last:
                    begin_at = row.begin + first - at
                    piece = Row(sequence=row.sequence, begin=begin_at, num_rows=last - first, beam=row.beam)
                    (decodes if idx < len(self.decodes) else chunks)[part].append(piece)
            at += row.num_rows
        return [Step(decodes=tuple(d), chunks=tuple(c)) for d, c in zip(decodes, chunks, strict=True)]

    def kept_rows(self) -> tuple[list[int], dict[Sequence, tuple[int, int]]]:
        """List the rows of the packed batch that need logits, and where each sequence's lie among these.

        Returns the rows, and begin and end by sequence.
        """
        keep: list[int] = []
        spans: dict[Sequence, tuple[int, int]] = {}
        at = 0
        for row in self.rows:
            begin = len(keep)
            if row.sequence.is_score:
                keep += range(at, at + row.num_rows - int(row.reaches_end))
            elif row.reaches_end:
                keep.append(at + row.num_rows - 1)
            spans[row.sequence] = (spans.get(row.sequence, (begin,))[0], len(keep))
            at += row.num_rows
        return keep, spans
