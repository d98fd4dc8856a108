"""The manifest of a checkpoint: made once in one pass over its bytes, and cached.

Owns the checksums of the experts and of the tensors that routers read, and the cache. With a manifest a worker needs
neither transformers nor the names of an architecture. What the cache keeps is found by what it was made from: small
files by their contents, weights by size and mtime. Allocates no tensor.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from collegium.model import identity
from collegium.model.architectures import Role, read_architecture
from collegium.model.cache_root import cache_file
from collegium.model.checkpoint_files import CheckpointError, open_file, shown
from collegium.model.checkpoint_survey import survey_checkpoint
from collegium.model.manifest_entries import ExpertEntry, LayerEntry, Manifest, TensorRef
from collegium.model.manifest_file import VERSION, ManifestPathError, load_manifest, write_manifest
from collegium.model.router_tensors import RouterTensor, common_name
from collegium.model.safetensors_files import list_weight_files
from collegium.model.served_dtype import auto_dtype
from collegium.model.shared_tensors import with_shared

__all__ = [
    "ExpertEntry",
    "LayerEntry",
    "Manifest",
    "ManifestPathError",
    "TensorRef",
    "build_manifest",
    "check_folder",
    "checksum_of",
    "ensure_manifest",
    "load_manifest",
]

_READ_BYTES = 16 << 20  # large enough for sequential reads, small enough to show progress

Progress = Callable[[int, int], None]


def ensure_manifest(
    model_dir: Path, *, out: Path | None = None, progress: Progress | None = None, shares: bool = False
) -> Path:
    """Return the path of the checkpoint's manifest, made now unless a cached one still fits its files.

    `shares`: as build_manifest has it. `progress(done_bytes, total_bytes)` is called as the pass goes on. cache_root
    says where the cache is. Folders are made for the cache alone. Raises CheckpointError, UnsupportedModelError or
    ManifestPathError.
    """
    model_dir = Path(os.path.realpath(model_dir))
    read_architecture(model_dir)
    sources, files = identity.read_sources(model_dir), list_weight_files(model_dir)
    path = out or _cache_path(model_dir, sources, files, shares=shares)
    if os.path.exists(path):
        try:
            cached = load_manifest(path)
        except CheckpointError:
            cached = None
        if cached is not None and _is_made_from(cached, model_dir, sources, files, shares=shares):
            return path
    if os.path.isdir(path):  # said before the pass, which can be long
        raise ManifestPathError(f"{path} is a folder; name a file")
    if out is not None and not os.path.isdir(path.parent):
        raise ManifestPathError(f"{path.parent} is not a folder; make it first")
    write_manifest(path, build_manifest(model_dir, progress=progress, shares=shares))
    return path


def check_folder(manifest: Manifest, model_dir: Path) -> None:
    """Check that a manifest is the one of a folder, which may be another than the one that it was made from.

    Reads the router's tensors if the weight files are not those that the manifest knows. Raises CheckpointError naming
    what differs.
    """
    model_dir = Path(os.path.realpath(model_dir))
    sources, files = identity.read_sources(model_dir), list_weight_files(model_dir)
    if not (manifest.model_dir == str(model_dir) and dict(manifest.files) == files):
        sources[identity.ROUTER] = _digest_router(model_dir, survey_checkpoint(model_dir).router, _Meter(None, 0))
    known = {name: digest for name, digest in manifest.sources.items() if name in sources}
    if told := identity.tell_differences(known, sources):
        raise CheckpointError(
            f"the manifest is of another checkpoint than {model_dir}: {told}; run `collegium manifest` on the "
            "model's folder"
        )


def build_manifest(model_dir: Path, *, progress: Progress | None = None, shares: bool = False) -> Manifest:
    """Scan a checkpoint; `progress(done_bytes, total_bytes)` is called as the pass goes on.

    shares: have shared experts follow the routed ones of each layer, so that workers compute them.
    Raises UnsupportedModelError, or CheckpointError naming the first field that is wrong, or the first tensor that is
    missing, truncated or of a wrong shape.
    """
    survey, num_shared = survey_checkpoint(model_dir), 0
    if shares:
        survey, num_shared = with_shared(survey)
    sources = identity.read_sources(model_dir)
    total = sum(ref.num_bytes for ref in survey.shares()) + sum(one.num_bytes for one in survey.router)
    meter = _Meter(progress, total)
    layers = tuple(
        LayerEntry(
            decoder_layer=layer,
            experts=tuple(_entry(model_dir, survey.experts[layer][e], meter) for e in range(survey.num_experts)),
        )
        for layer in sorted(survey.experts)
    )
    stored = {
        "experts": tuple(sorted({ref.dtype for ref in survey.shares()})),
        "router": tuple(sorted({one.dtype for one in survey.router if len(one.shape) > 1})),
    }
    return Manifest(
        model_dir=str(model_dir),
        model_type=survey.model_type,
        layout=survey.layout,
        form=survey.form,
        d_model=survey.d_model,
        d_ffn=survey.d_ffn,
        top_k=survey.top_k,
        dtype=auto_dtype(stored["experts"]),
        layers=layers,
        files=survey.files,
        sources=sources | {identity.ROUTER: _digest_router(model_dir, survey.router, meter)},
        stored_dtypes=stored,
        num_shared=num_shared,
    )


def checksum_of(model_dir: Path, tensors: tuple[TensorRef, ...]) -> str:
    """Take the XXH3-64 of an expert's stored bytes, in the order of its tensors.

    Raises CheckpointError if bytes lack.
    """
    digest = xxhash.xxh3_64()
    for ref in tensors:
        for begin, num_bytes in ref.spans():
            _update(digest, model_dir / ref.file, ref.key, begin, num_bytes)
    return digest.hexdigest()


def _digest_router(model_dir: Path, router: Sequence[RouterTensor], meter: "_Meter") -> str:
    """Take the digest of tensors by name, type, shape and bytes; where they lie does not matter."""
    sums: list[object] = []
    for one in sorted(router, key=lambda one: (one.file, one.offset)):  # in the order of the disk
        digest = xxhash.xxh3_64()
        _update(digest, model_dir / one.file, one.key, one.offset, one.num_bytes)
        sums.append([common_name(one.key), one.dtype, one.shape, digest.hexdigest()])
        meter.add(one.num_bytes)
    return identity.digest_of(sorted(sums, key=str))


class _Meter:
    """Counts bytes and tells how far the pass is."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _update(digest: "xxhash.xxh3_64", path: Path, key: str, begin: int, num_bytes: int) -> None:
    with open_file(path) as file:
        position, end = begin, begin + num_bytes
        while position < end:
            try:
                data = os.pread(file.fileno(), min(_READ_BYTES, end - position), position)
            except OSError as error:
                raise CheckpointError(f"{path}: tensor {shown(key)} cannot be read: {error.strerror}") from error
            if not data:
                raise CheckpointError(f"{path} ends inside tensor {shown(key)}: the file is truncated")
            digest.update(data)
            position += len(data)


def _entry(model_dir: Path, roles: Mapping[Role, TensorRef], meter: _Meter) -> ExpertEntry:
    tensors = tuple(roles[role] for role in sorted(roles))
    entry = ExpertEntry(tensors=tensors, checksum=checksum_of(model_dir, tensors))
    meter.add(entry.num_bytes)
    return entry


def _is_made_from(
    cached: Manifest,
    model_dir: Path,
    sources: Mapping[str, str],
    files: Mapping[str, tuple[int, int]],
    *,
    shares: bool,
) -> bool:
    known = {name: digest for name, digest in cached.sources.items() if name != identity.ROUTER}
    is_same = cached.model_dir == str(model_dir) and bool(cached.num_shared) == shares
    return is_same and known == dict(sources) and dict(cached.files) == dict(files)


def _cache_path(
    model_dir: Path, sources: Mapping[str, str], files: Mapping[str, tuple[int, int]], *, shares: bool
) -> Path:
    what = [VERSION, str(model_dir), sorted(sources.items()), sorted(files.items()), *["shares"] * shares]
    name = hashlib.blake2b(json.dumps(what).encode(), digest_size=12).hexdigest()
    return cache_file(f"manifests/{name}.json")
