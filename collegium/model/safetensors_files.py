"""Which files hold a checkpoint's tensors, and what their headers say: as the safetensors library reads them.

Owns the index and the header of a file. Both come from strangers: sizes and numbers of entries are bounded, names must
be plain, and every tensor's bytes must be where its shape and type say, next to the one before. Reads no tensor.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import (
    CheckpointError,
    has_file,
    kind_of,
    open_file,
    parse_json,
    read_json,
    shown,
)

# A file with 100,000 tensors has a header of 13 MB. The whole of Kimi K2 has 70,000 tensors.
HEADER_BYTES = 16 << 20
INDEX_BYTES = 48 << 20
MAX_TENSORS = 250_000  # of a checkpoint, all files together
MAX_FILES = 4096
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_LENGTH = 1 << 48  # of a tensor's dimension; products of a few stay exact and are compared with the file's size

ITEM_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header; offsets count from where the tensors' bytes start."""

    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def list_weight_files(model_dir: Path) -> dict[str, tuple[int, int]]:
    """List the checkpoint's safetensors files, chosen as transformers chooses: name -> (bytes, mtime in ns).

    Raises CheckpointError naming the index, or the file that is missing or is none.
    """
    if has_file(model_dir / _SINGLE):
        names = [_SINGLE]
    elif has_file(model_dir / _INDEX):
        names = _names_of_index(model_dir / _INDEX)
    elif any(model_dir.glob("*.safetensors")):
        raise CheckpointError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}; fetch the checkpoint again")
    else:
        raise CheckpointError(f"{model_dir} holds no .safetensors file: convert the checkpoint to safetensors first")
    files: dict[str, tuple[int, int]] = {}
    for name in names:
        with open_file(model_dir / name) as file:
            stat = os.fstat(file.fileno())
        files[name] = (stat.st_size, stat.st_mtime_ns)
    return files


def is_plain_name(name: object) -> bool:
    """Return True for the name of a file of the checkpoint's own folder: no path, no control character."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name.isprintable()
        and "/" not in name
        and name not in (".", "..")
    )


def _names_of_index(path: Path) -> list[str]:
    weights = read_json(path, limit_bytes=INDEX_BYTES).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        kind = "empty" if isinstance(weights, dict) else kind_of(weights)
        raise CheckpointError(f"{path}: weight_map is {kind}; it must be an object that names files")
    entries = cast("dict[str, object]", weights)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: weight_map has {len(entries)} tensors; the maximum is {MAX_TENSORS}")
    for key, name in entries.items():
        if not is_plain_name(name) or not str(name).endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map names {shown(name)} for tensor {shown(key)}; it must be the plain name of a "
                ".safetensors file"
            )
    names = sorted({str(name) for name in entries.values()})
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{path}: weight_map names {len(names)} files; the maximum is {MAX_FILES}")
    return names


def read_headers(model_dir: Path, names: Mapping[str, object]) -> Iterator[tuple[str, dict[str, StoredTensor], int]]:
    """Read the headers of files: (name, tensors by key, where their bytes start) of each.

    Raises CheckpointError as read_header, if a tensor is in two files, or if all together have too many.
    """
    found: dict[str, str] = {}
    for name in names:
        header, start = read_header(model_dir / name)
        for key in header:
            if key in found:
                raise CheckpointError(
                    f"{model_dir / name}: tensor {shown(key)} is in {found[key]} too; fetch the checkpoint again"
                )
            found[key] = name
        _check_count(model_dir, len(found))
        yield name, header, start


def read_header(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """Read a safetensors header: tensors by name, and where their bytes start.

    Raises CheckpointError naming the file, and the tensor whose entry is wrong.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: it is {size} bytes long and its header does not fit"
            )
        if length > HEADER_BYTES:
            raise CheckpointError(f"{path} has a header of {length} bytes; the maximum is {HEADER_BYTES}")
        data = b""
        while len(data) < length and (part := file.read(length - len(data))):
            data += part
    if not data.startswith(b"{"):
        raise CheckpointError(f"{path} has a damaged safetensors header: it is no JSON object")
    _check_count(path, data.count(b'"data_offsets"'))
    try:
        raw = parse_json(data, "its JSON")
    except CheckpointError as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from None
    metadata = raw.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise CheckpointError(f"{path} has a damaged safetensors header: __metadata__ is not an object of texts")
    _check_count(path, len(raw))
    header = {key: _stored_tensor(path, key, entry) for key, entry in raw.items()}
    _check_places(path, header, size - 8 - length)
    return header, 8 + length


def _check_count(path: Path, number: int) -> None:
    if number > MAX_TENSORS:
        raise CheckpointError(f"{path} has {number} tensors; the maximum is {MAX_TENSORS}")


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in cast("dict[str, object]", value).values())


def _stored_tensor(path: Path, key: str, entry: object) -> StoredTensor:
    fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _lengths(fields.get("shape")), _lengths(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{path}: tensor {shown(key)} is of type {shown(dtype)}, which safetensors does not have")
    if shape is None or len(shape) > 16:
        raise CheckpointError(f"{path}: tensor {shown(key)} has shape {shown(fields.get('shape'))}, which is none")
    if offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {shown(key)} has data_offsets {shown(fields.get('data_offsets'))}; two numbers are needed"
        )
    num_bits = ITEM_BITS[dtype]
    for length in shape:
        num_bits *= length
    if num_bits % 8 or offsets[1] - offsets[0] != num_bits // 8:
        raise CheckpointError(
            f"{path}: tensor {shown(key)} of shape {list(shape)} and type {dtype} takes {num_bits // 8} bytes, its "
            f"data_offsets {list(offsets)} span {offsets[1] - offsets[0]}"
        )
    return StoredTensor(dtype, shape, (offsets[0], offsets[1]))


def _lengths(value: object) -> tuple[int, ...] | None:
    """Read a list of numbers from 0 to _MAX_LENGTH; None if it is anything else."""
    if not isinstance(value, list):
        return None
    found: list[int] = []
    for one in cast("list[object]", value):
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one <= _MAX_LENGTH:
            return None
        found.append(one)
    return tuple(found)


def _check_places(path: Path, header: Mapping[str, StoredTensor], num_bytes: int) -> None:
    """Check that the tensors fill the file's bytes one after the other, as the safetensors library demands."""
    end, before = 0, "the header"
    for key, tensor in sorted(header.items(), key=lambda item: item[1].offsets):
        first, last = tensor.offsets
        if first != end:
            how = "overlaps" if first < end else "does not follow"
            raise CheckpointError(
                f"{path}: tensor {shown(key)} {how} {shown(before)}: its data_offsets begin at {first}, not at {end}"
            )
        if last > num_bytes:
            raise CheckpointError(f"{path} ends inside tensor {shown(key)}: the file is truncated; fetch it again")
        end, before = last, key
    if end != num_bytes:
        raise CheckpointError(
            f"{path} has {num_bytes - end} bytes after its last tensor: it is damaged; fetch it again"
        )
