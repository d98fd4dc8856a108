"""Read one expert's weights from the files that the manifest names, in the one form that every kernel starts from.

Owns ExpertWeights and ExpertReader. Reads exactly the bytes of that expert, into memory of its own: no file stays
mapped, and a reader's memory is made once.
D model, F ffn.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from collegium.model.architectures import Layout, Role
from collegium.model.checkpoint_files import CheckpointError, open_file
from collegium.model.manifest_entries import ExpertEntry, Manifest, TensorRef

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_STORED_AS = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_ORDER = (
    Role.GATE,
    Role.UP,
    Role.GATE_UP,
    Role.GATE_UP_BIAS,
    Role.UP_BIAS,
    Role.DOWN,
    Role.DOWN_BIAS,
)  # gate_up first, then down
_ALIGNED = 64  # where tensors of several types follow each other, each begins at a multiple of this many bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One expert, gate above up, or up alone where it is not gated. Biases only where the architecture has them."""

    gate_up: Tensor  # [2F, D] or [F, D]
    down: Tensor  # [D, F]
    gate_up_bias: Tensor | None = None  # [2F] or [F]
    down_bias: Tensor | None = None  # [D]

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate beside up."""
        return self.gate_up.shape[0] > self.down.shape[1]


def empty_weights(manifest: Manifest, dtype: torch.dtype) -> ExpertWeights:
    """Zeros in the form of a manifest's experts."""
    d_model, d_ffn, has_bias = manifest.d_model, manifest.d_ffn, manifest.has_bias
    num_hidden = d_ffn * (1 + manifest.form.is_gated)
    return ExpertWeights(
        gate_up=torch.zeros(num_hidden, d_model, dtype=dtype),
        down=torch.zeros(d_model, d_ffn, dtype=dtype),
        gate_up_bias=torch.zeros(num_hidden, dtype=dtype) if has_bias else None,
        down_bias=torch.zeros(d_model, dtype=dtype) if has_bias else None,
    )


class ExpertReader:
    """Reads experts into memory of its own that is used again by the next one. For one thread at a time."""

    def __init__(self, manifest: Manifest, dtype: torch.dtype):
        """Set memory aside for one expert as stored, and for one in `dtype` where that is another form."""
        self._manifest, self._dtype = manifest, dtype
        stored = {ref.dtype for layer in manifest.layers for e in layer.experts for ref in e.tensors}
        is_as_stored = manifest.layout in (Layout.PER_EXPERT, Layout.FUSED) and stored == {_STORED_AS[dtype]}
        self._step = 1 if is_as_stored else _ALIGNED
        largest = max(self._size(entry) for layer in manifest.layers for entry in layer.experts)
        self._raw = torch.empty(largest, dtype=torch.uint8)
        self._form = None if is_as_stored else empty_weights(manifest, dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes set aside."""
        form = self._form
        parts = () if form is None else (form.gate_up, form.down, form.gate_up_bias, form.down_bias)
        return self._raw.nbytes + sum(part.nbytes for part in parts if part is not None)

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Read and check one expert; what is returned is valid until the next call.

        Raises CheckpointError naming layer, expert and file where bytes lack or the checksum differs. Blocks on the
        disk.
        """
        entry = self._manifest.layers[layer].experts[expert]
        raw: dict[Role, Tensor] = {}
        at = 0
        for ref in sorted(entry.tensors, key=lambda ref: _ORDER.index(ref.role)):  # gate and up next to each other
            raw[ref.role] = self._raw[at : at + ref.num_bytes]
            _read(Path(self._manifest.model_dir) / ref.file, ref, raw[ref.role].numpy().data)
            at += -(-ref.num_bytes // self._step) * self._step
        _verify(self._manifest, layer, expert, entry, raw)
        if self._form is None:
            d_model, d_ffn = self._manifest.d_model, self._manifest.d_ffn
            stored, split = self._raw.view(self._dtype), 2 * d_ffn * d_model
            return ExpertWeights(
                gate_up=stored[:split].view(2 * d_ffn, d_model), down=stored[split:].view(d_model, d_ffn)
            )
        tensors = {ref.role: raw[ref.role].view(_TORCH_DTYPES[ref.dtype]).view(ref.shape) for ref in entry.tensors}
        self._fill(self._form, tensors)
        return self._form

    def _size(self, entry: ExpertEntry) -> int:
        return sum(-(-ref.num_bytes // self._step) * self._step for ref in entry.tensors)

    def _fill(self, form: ExpertWeights, tensors: dict[Role, Tensor]) -> None:
        d_ffn = self._manifest.d_ffn
        gate, up = form.gate_up[:d_ffn], form.gate_up[d_ffn:]
        is_apart = Role.GATE in tensors  # as shared experts are stored, whatever the layout of the others
        match Layout.PER_EXPERT if is_apart and self._manifest.layout is Layout.FUSED else self._manifest.layout:
            case Layout.PER_EXPERT:
                gate.copy_(tensors[Role.GATE])
                up.copy_(tensors[Role.UP])
                form.down.copy_(tensors[Role.DOWN])
            case Layout.FUSED:
                form.gate_up.copy_(tensors[Role.GATE_UP])
                form.down.copy_(tensors[Role.DOWN])
            case Layout.UNGATED:
                # Layers of an encoder and a decoder may differ in width: hidden rows that are not there are zeros,
                # which the activation leaves zeros, and which nothing is read from.
                width = tensors[Role.UP].shape[0]
                form.gate_up[:width].copy_(tensors[Role.UP])
                form.gate_up[width:].zero_()
                form.down[:, :width].copy_(tensors[Role.DOWN])
                form.down[:, width:].zero_()
                if form.gate_up_bias is not None and form.down_bias is not None:
                    form.gate_up_bias[:width].copy_(tensors[Role.UP_BIAS])
                    form.gate_up_bias[width:].zero_()
                    form.down_bias.copy_(tensors[Role.DOWN_BIAS])
            case Layout.STACKED:
                gate.copy_(tensors[Role.GATE])
                up.copy_(tensors[Role.UP])
                form.down.copy_(tensors[Role.DOWN].t())
            case Layout.FUSED_TRANSPOSED:
                both = tensors[Role.GATE_UP].t()  # [2F, D], gate and up interleaved
                gate.copy_(both[::2])
                up.copy_(both[1::2])
                form.down.copy_(tensors[Role.DOWN].t())
                assert form.gate_up_bias is not None and form.down_bias is not None
                form.gate_up_bias[:d_ffn].copy_(tensors[Role.GATE_UP_BIAS][::2])
                form.gate_up_bias[d_ffn:].copy_(tensors[Role.GATE_UP_BIAS][1::2])
                form.down_bias.copy_(tensors[Role.DOWN_BIAS])


def read_expert(manifest: Manifest, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
    """Read and check one expert, cast to `dtype`, into memory of its own; errors as `ExpertReader.read`."""
    return ExpertReader(manifest, dtype).read(layer, expert)


def _read(path: Path, ref: TensorRef, view: memoryview) -> None:
    at = 0
    try:
        with open_file(path) as file:
            for begin, num_bytes in ref.spans():
                done = 0
                while done < num_bytes:
                    count = os.preadv(file.fileno(), [view[at + done : at + num_bytes]], begin + done)
                    if not count:
                        raise CheckpointError(f"{path} ends inside tensor {ref.key}: the file is truncated")
                    done += count
                at += num_bytes
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {ref.key} cannot be read: {error.strerror}") from error


def _verify(manifest: Manifest, layer: int, expert: int, entry: ExpertEntry, raw: dict[Role, Tensor]) -> None:
    digest = xxhash.xxh3_64()
    for ref in entry.tensors:
        digest.update(raw[ref.role].numpy().data)
    if digest.hexdigest() != entry.checksum:
        files = ", ".join(sorted({ref.file for ref in entry.tensors}))
        raise CheckpointError(
            f"expert {expert} of MoE layer {layer} does not match its checksum ({files} in {manifest.model_dir}): "
            "the file has changed or is damaged; fetch it again and run `collegium manifest`"
        )
