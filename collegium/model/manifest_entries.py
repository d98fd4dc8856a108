"""What a manifest says: which bytes of which file are which expert's, and the digests that make up its identity.

Owns the values alone; the scan makes them, and the manifest's file keeps them. L MoE layers, E experts, D model, F ffn.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from collegium.model import identity
from collegium.model.architectures import ExpertForm, Layout, Role

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where one expert's share of a stored tensor lies.

    `offset` counts bytes from the start of the file; `shape` is that of the share alone.
    """

    file: str
    key: str
    role: Role
    offset: int
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", "F16"
    row_bytes: int = 0  # from one row's begin to the next one's in the file; 0: rows follow each other

    @property
    def num_bytes(self) -> int:
        """Size of the share in bytes."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where its bytes lie, in order: (from the start of the file, how many)."""
        if not self.row_bytes:
            yield self.offset, self.num_bytes
            return
        width = self.num_bytes // self.shape[0]
        for row in range(self.shape[0]):
            yield self.offset + row * self.row_bytes, width


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEntry:
    """One expert: its tensors and the XXH3-64 of their bytes in order."""

    tensors: tuple[TensorRef, ...]
    checksum: str

    @property
    def num_bytes(self) -> int:
        """Size of the expert in the files, in bytes."""
        return sum(t.num_bytes for t in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntry:
    """One MoE layer: its place in the decoder and its experts, by index."""

    decoder_layer: int
    experts: tuple[ExpertEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that a worker needs to know of a checkpoint."""

    model_dir: str
    model_type: str
    layout: Layout
    form: ExpertForm
    d_model: int
    d_ffn: int
    top_k: int
    dtype: str  # in which the weights are served unless a service is told another one
    layers: tuple[LayerEntry, ...]
    files: Mapping[str, tuple[int, int]]  # name -> (size, mtime in ns) at the time of the pass
    sources: Mapping[str, str]  # digests of the parts that are not derived from the fields above, by name
    stored_dtypes: Mapping[str, tuple[str, ...]]  # of "experts" and of the "router" matrices, safetensors' names
    num_shared: int = 0  # the last experts of each layer, which every token has; counted in top_k

    @property
    def has_bias(self) -> bool:
        """Whether experts have biases."""
        first = [expert for layer in self.layers[:1] for expert in layer.experts[:1]]
        return any(tensor.role is Role.DOWN_BIAS for expert in first for tensor in expert.tensors)

    @property
    def num_params(self) -> int:
        """Weights of one expert in a worker's memory."""
        if self.layout is Layout.UNGATED:  # stacks may differ in width: each has room for the widest
            return 2 * self.d_model * self.d_ffn + (self.d_model + self.d_ffn if self.has_bias else 0)
        return sum(t.num_bytes // ITEM_BYTES[t.dtype] for t in self.layers[0].experts[0].tensors)

    @property
    def parts(self) -> dict[str, str]:
        """Digests of everything that decides an answer, by the names of collegium.model.identity."""
        arithmetic = [self.model_type, asdict(self.form), self.d_model, self.d_ffn, self.top_k]
        experts = [
            [layer.decoder_layer, [[e.checksum, sorted({t.dtype for t in e.tensors})] for e in layer.experts]]
            for layer in self.layers
        ]
        place = {identity.SHARED: identity.digest_of(self.num_shared)} if self.num_shared else {}
        return dict(self.sources) | {
            identity.EXPERTS: identity.digest_of(experts),
            identity.ARITHMETIC: identity.digest_of(arithmetic),
            **place,
        }

    @property
    def digest(self) -> str:
        """The one digest of all parts: equal digests mean equal answers at an equal dtype."""
        return identity.digest_of(self.parts)
