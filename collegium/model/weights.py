"""Read one expert's weights from the files that the manifest names, in the one form that every kernel starts from.

Owns ExpertWeights. Reads exactly the bytes of that expert, into memory of its own: no file stays mapped.
D model, F ffn.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from collegium.model.architectures import CheckpointError, Layout, Role
from collegium.model.manifest import ExpertEntry, Manifest, TensorRef

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One expert, gate above up. Biases only where the architecture has them."""

    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]
    gate_up_bias: Tensor | None = None  # [2F]
    down_bias: Tensor | None = None  # [D]


def read_expert(
    manifest: Manifest, layer: int, expert: int, dtype: torch.dtype, *, verify: bool = True
) -> ExpertWeights:
    """Read and check one expert, cast to `dtype`.

    Raises CheckpointError naming layer, expert and file where bytes lack or the checksum differs. Blocks on the disk.
    """
    entry = manifest.layers[layer].experts[expert]
    raw = {ref.role: _read(Path(manifest.model_dir) / ref.file, ref) for ref in entry.tensors}
    if verify:
        _verify(manifest, layer, expert, entry, raw)
    tensors = {ref.role: _tensor(raw[ref.role], ref, dtype) for ref in entry.tensors}
    match manifest.layout:
        case Layout.PER_EXPERT:
            return ExpertWeights(gate_up=torch.cat([tensors[Role.GATE], tensors[Role.UP]]), down=tensors[Role.DOWN])
        case Layout.FUSED:
            return ExpertWeights(gate_up=tensors[Role.GATE_UP], down=tensors[Role.DOWN])
        case Layout.STACKED:
            gate_up = torch.cat([tensors[Role.GATE], tensors[Role.UP]])
            return ExpertWeights(gate_up=gate_up, down=tensors[Role.DOWN].t().contiguous())
        case Layout.FUSED_TRANSPOSED:
            gate_up = tensors[Role.GATE_UP].t()  # [2F, D], gate and up interleaved
            bias = tensors[Role.GATE_UP_BIAS]
            return ExpertWeights(
                gate_up=torch.cat([gate_up[::2], gate_up[1::2]]).contiguous(),
                down=tensors[Role.DOWN].t().contiguous(),
                gate_up_bias=torch.cat([bias[::2], bias[1::2]]),
                down_bias=tensors[Role.DOWN_BIAS],
            )


def _read(path: Path, ref: TensorRef) -> bytearray:
    data = bytearray(ref.num_bytes)
    view, position = memoryview(data), 0
    try:
        with path.open("rb", buffering=0) as file:
            while position < len(data):
                count = os.preadv(file.fileno(), [view[position:]], ref.offset + position)
                if not count:
                    raise CheckpointError(f"{path} ends inside tensor {ref.key}: the file is truncated")
                position += count
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {ref.key} cannot be read: {error.strerror}") from error
    return data


def _verify(manifest: Manifest, layer: int, expert: int, entry: ExpertEntry, raw: dict[Role, bytearray]) -> None:
    digest = xxhash.xxh3_64()
    for ref in entry.tensors:
        digest.update(raw[ref.role])
    if digest.hexdigest() != entry.checksum:
        files = ", ".join(sorted({ref.file for ref in entry.tensors}))
        raise CheckpointError(
            f"expert {expert} of MoE layer {layer} does not match its checksum ({files} in {manifest.model_dir}): "
            "the file has changed or is damaged; fetch it again and run `collegium manifest`"
        )


def _tensor(data: bytearray, ref: TensorRef, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=_TORCH_DTYPES[ref.dtype]).view(ref.shape).to(dtype)
