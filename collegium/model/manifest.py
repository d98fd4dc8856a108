"""The manifest of a checkpoint: which bytes of which file are which expert's.

Computed once per checkpoint, in one pass that also takes a checksum of every expert, and cached; a worker then needs
neither transformers nor the names of an architecture. Reads safetensors headers and raw bytes; allocates no tensor.
L MoE layers, E experts, D model, F ffn.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from collegium.model.architectures import (
    Activation,
    Architecture,
    CheckpointError,
    ExpertForm,
    Layout,
    Role,
    architecture_of,
    config_int,
    expert_form,
    read_config,
    role_of,
)
from collegium.model.cache_root import cache_file

VERSION = 1


class ManifestPathError(OSError):
    """The manifest cannot be written where it should go; the checkpoint is not at fault."""


_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_READ_BYTES = 16 << 20  # large enough for sequential reads, small enough to show progress


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

    @property
    def num_bytes(self) -> int:
        """Size of the share in bytes."""
        size = _ITEM_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


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
    dtype: str
    layers: tuple[LayerEntry, ...]
    files: Mapping[str, tuple[int, int]]  # name -> (size, mtime in ns) at the time of the pass
    digest: str

    @property
    def num_params(self) -> int:
        """Weights of one expert."""
        return sum(t.num_bytes // _ITEM_BYTES[t.dtype] for t in self.layers[0].experts[0].tensors)


def ensure_manifest(
    model_dir: Path, *, out: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Return the path of the checkpoint's manifest, made now unless a cached one still fits its files.

    `progress(done_bytes, total_bytes)` is called as the pass goes on. cache_root says where the cache is. Folders are
    made for the cache alone. Raises CheckpointError, UnsupportedModelError or ManifestPathError.
    """
    model_dir = model_dir.resolve()
    files = _files_of(model_dir)
    path = out or _cache_path(model_dir, files)
    if path.exists():
        try:
            cached = load_manifest(path)
        except CheckpointError:
            cached = None
        if cached is not None and cached.model_dir == str(model_dir) and dict(cached.files) == files:
            return path
    if path.is_dir():  # said before the pass, which can be long
        raise ManifestPathError(f"{path} is a folder; name a file")
    if out is not None and not path.parent.is_dir():
        raise ManifestPathError(f"{path.parent} is not a folder; make it first")
    _write(path, build_manifest(model_dir, progress=progress))
    return path


def _write(path: Path, manifest: Manifest) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"version": VERSION, **asdict(manifest)}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ManifestPathError(f"{path} cannot be written: {error.strerror}; name another file") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises CheckpointError naming the file where it is not one of this version."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise CheckpointError(f"manifest {path} is of another version: remove it and run `collegium manifest`")
        layers = tuple(
            LayerEntry(
                decoder_layer=layer["decoder_layer"],
                experts=tuple(
                    ExpertEntry(
                        tensors=tuple(_tensor_ref(tensor) for tensor in expert["tensors"]),
                        checksum=expert["checksum"],
                    )
                    for expert in layer["experts"]
                ),
            )
            for layer in raw["layers"]
        )
        known = {k: raw[k] for k in ("model_dir", "model_type", "d_model", "d_ffn", "top_k", "dtype", "digest")}
        return Manifest(
            **known,
            layout=Layout(raw["layout"]),
            form=ExpertForm(**raw["form"] | {"activation": Activation(raw["form"]["activation"])}),
            layers=layers,
            files={name: (size, mtime) for name, (size, mtime) in raw["files"].items()},
        )
    except FileNotFoundError:
        raise CheckpointError(f"manifest {path} does not exist: run `collegium manifest MODEL_DIR`") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"manifest {path} cannot be read ({error}): remove it and run `collegium manifest`"
        ) from None


def _tensor_ref(raw: dict[str, Any]) -> TensorRef:
    role, shape = Role(raw["role"]), tuple(raw["shape"])
    return TensorRef(file=raw["file"], key=raw["key"], role=role, offset=raw["offset"], shape=shape, dtype=raw["dtype"])


def build_manifest(model_dir: Path, *, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Scan a checkpoint. Raises CheckpointError naming the first tensor that is missing, truncated or of a wrong
    shape.
    """
    config = read_config(model_dir)
    architecture = architecture_of(config)
    form = expert_form(config)
    files = _files_of(model_dir)
    num_experts = config_int(config, architecture.num_experts_key)
    top_k = config_int(config, architecture.top_k_key)
    if num_experts is None or top_k is None:
        missing = architecture.num_experts_key if num_experts is None else architecture.top_k_key
        raise CheckpointError(f"{model_dir / 'config.json'} lacks {missing}")
    num_layers = config_int(config, architecture.num_layers_key)
    found: dict[int, dict[int, dict[Role, TensorRef]]] = {}
    for name in files:
        for ref, layer, expert in _expert_tensors(model_dir / name, architecture, num_experts):
            if num_layers is None or layer < num_layers:  # further ones predict more than one token and are not served
                found.setdefault(layer, {}).setdefault(expert, {})[ref.role] = ref
    if not found:
        raise CheckpointError(f"{model_dir} holds no expert tensors of a {architecture.model_type} checkpoint")
    d_model, d_ffn = _check_complete(model_dir, architecture, found, num_experts)
    total = sum(ref.num_bytes for layer in found.values() for expert in layer.values() for ref in expert.values())
    done = 0
    layers: list[LayerEntry] = []
    for decoder_layer in sorted(found):
        experts: list[ExpertEntry] = []
        for expert in range(num_experts):
            tensors = tuple(found[decoder_layer][expert][role] for role in sorted(found[decoder_layer][expert]))
            experts.append(ExpertEntry(tensors=tensors, checksum=checksum_of(model_dir, tensors)))
            done += sum(t.num_bytes for t in tensors)
            if progress is not None:
                progress(done, total)
        layers.append(LayerEntry(decoder_layer=decoder_layer, experts=tuple(experts)))
    dtypes = {t.dtype for layer in layers for e in layer.experts for t in e.tensors}
    digest = hashlib.blake2b(
        json.dumps([architecture.model_type, [[e.checksum for e in layer.experts] for layer in layers]]).encode(),
        digest_size=16,
    ).hexdigest()
    return Manifest(
        model_dir=str(model_dir),
        model_type=architecture.model_type,
        layout=architecture.layout,
        form=form,
        d_model=d_model,
        d_ffn=d_ffn,
        top_k=top_k,
        dtype="float32" if "F32" in dtypes else "bfloat16",
        layers=tuple(layers),
        files=files,
        digest=digest,
    )


def checksum_of(model_dir: Path, tensors: tuple[TensorRef, ...]) -> str:
    """Take the XXH3-64 of an expert's stored bytes, in the order of its tensors. Raises CheckpointError where bytes
    lack.
    """
    digest = xxhash.xxh3_64()
    for ref in tensors:
        with (model_dir / ref.file).open("rb", buffering=0) as file:
            position, end = ref.offset, ref.offset + ref.num_bytes
            while position < end:
                data = os.pread(file.fileno(), min(_READ_BYTES, end - position), position)
                if not data:
                    raise CheckpointError(f"{model_dir / ref.file} ends inside tensor {ref.key}: the file is truncated")
                digest.update(data)
                position += len(data)
    return digest.hexdigest()


def _files_of(model_dir: Path) -> dict[str, tuple[int, int]]:
    """List the checkpoint's safetensors files, as its index says where there is one."""
    read_config(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if (model_dir / "model.safetensors").exists():  # as transformers chooses
        names = ["model.safetensors"]
    elif index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from None
    else:
        names = sorted(p.name for p in model_dir.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{model_dir} holds no .safetensors file: convert the checkpoint to safetensors first")
    files: dict[str, tuple[int, int]] = {}
    for name in names:
        try:
            stat = (model_dir / name).stat()
        except OSError as error:
            raise CheckpointError(
                f"{model_dir / name} is named in the index and cannot be read: {error.strerror}"
            ) from None
        files[name] = (stat.st_size, stat.st_mtime_ns)
    return files


def _cache_path(model_dir: Path, files: Mapping[str, tuple[int, int]]) -> Path:
    config_mtime = (model_dir / "config.json").stat().st_mtime_ns
    name = hashlib.blake2b(
        json.dumps([VERSION, str(model_dir), config_mtime, files]).encode(), digest_size=12
    ).hexdigest()
    return cache_file(f"manifests/{name}.json")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header; offsets count from where the tensors' bytes start."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """Read a safetensors header: tensors by name, and where their bytes start. Raises CheckpointError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: it is {size} bytes long and its header does not fit"
            )
        try:
            raw: dict[str, Any] = json.loads(file.read(length))
            raw.pop("__metadata__", None)
            header = {
                key: StoredTensor(
                    str(t["dtype"]), tuple(t["shape"]), (int(t["data_offsets"][0]), int(t["data_offsets"][1]))
                )
                for key, t in raw.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CheckpointError(f"{path} has a damaged safetensors header") from None
    start = 8 + length
    for key, tensor in header.items():
        if start + tensor.offsets[1] > size:
            raise CheckpointError(f"{path} ends inside tensor {key}: the file is truncated; fetch it again")
    return header, start


def _expert_tensors(path: Path, architecture: Architecture, num_experts: int) -> list[tuple[TensorRef, int, int]]:
    """List (share, decoder layer, expert) for every expert tensor of a file."""
    header, start = read_header(path)
    found: list[tuple[TensorRef, int, int]] = []
    for key, tensor in header.items():
        role = role_of(architecture, key)
        if role is None:
            continue
        what, layer, expert = role
        dtype, shape, (first, last) = tensor.dtype, tensor.shape, tensor.offsets
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{path}: tensor {key} is of type {dtype}; float32, bfloat16 and float16 are served")
        begin = start + first
        if expert is not None:
            shares = [(expert, shape, begin)]
        else:
            if (
                not shape
                or shape[0] % num_experts
                or (architecture.layout != Layout.STACKED and shape[0] != num_experts)
            ):
                raise CheckpointError(
                    f"{path}: tensor {key} has shape {list(shape)}, which does not hold {num_experts} experts"
                )
            share = (shape[0] // num_experts, *shape[1:]) if architecture.layout == Layout.STACKED else shape[1:]
            stride = (last - first) // num_experts
            shares = [(e, share, begin + e * stride) for e in range(num_experts)]
        found += [
            (TensorRef(file=path.name, key=key, role=what, offset=at, shape=share, dtype=dtype), layer, e)
            for e, share, at in shares
        ]
    return found


def _check_complete(
    model_dir: Path,
    architecture: Architecture,
    found: Mapping[int, Mapping[int, Mapping[Role, TensorRef]]],
    num_experts: int,
) -> tuple[int, int]:
    """Check that every expert of every layer is whole and of one shape; return (d_model, d_ffn)."""
    needed = set(architecture.patterns.values())
    sizes: set[tuple[int, int]] = set()
    for layer, experts in sorted(found.items()):
        for expert in range(num_experts):
            lacks = needed - set(experts.get(expert, {}))
            if lacks:
                raise CheckpointError(
                    f"{model_dir}: expert {expert} of decoder layer {layer} "
                    f"lacks its {', '.join(sorted(lacks))} tensor; fetch the checkpoint again"
                )
            sizes.add(_sizes_of(architecture.layout, experts[expert]))
        if extra := sorted(set(experts) - set(range(num_experts))):
            raise CheckpointError(
                f"{model_dir}: decoder layer {layer} has expert {extra[0]}, config.json names {num_experts}"
            )
    if len(sizes) != 1:
        raise CheckpointError(f"{model_dir}: experts differ in shape: (model, ffn) is one of {sorted(sizes)}")
    return sizes.pop()


def _sizes_of(layout: Layout, tensors: Mapping[Role, TensorRef]) -> tuple[int, int]:
    down = tensors[Role.DOWN].shape
    d_model, d_ffn = (down[0], down[1]) if layout in (Layout.PER_EXPERT, Layout.FUSED) else (down[1], down[0])
    wanted = {
        Role.GATE: (d_ffn, d_model),
        Role.UP: (d_ffn, d_model),
        Role.GATE_UP: (d_model, 2 * d_ffn) if layout == Layout.FUSED_TRANSPOSED else (2 * d_ffn, d_model),
        Role.GATE_UP_BIAS: (2 * d_ffn,),
        Role.DOWN_BIAS: (d_model,),
        Role.DOWN: down,
    }
    for role, ref in tensors.items():
        if ref.shape != wanted[role]:
            raise CheckpointError(f"tensor {ref.key} has shape {list(ref.shape)}, expected {list(wanted[role])}")
    return d_model, d_ffn
