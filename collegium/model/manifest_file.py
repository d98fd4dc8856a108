"""The manifest as a file: how it is written, sealed, and read by every worker and router.

Owns the file's form. A file that was edited does not fit its seal and is refused; what a file says is checked all the
same before names become paths and lengths become memory.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TypeVar, cast

from collegium.model.architectures import Activation, ExpertForm, Layout, Role
from collegium.model.checkpoint_files import CheckpointError, has_file, kind_of, read_json
from collegium.model.manifest_entries import ITEM_BYTES, ExpertEntry, LayerEntry, Manifest, TensorRef
from collegium.model.safetensors_files import is_plain_name

VERSION = 4
_FILE_BYTES = 512 << 20  # an expert takes some 600 bytes of it
_REMAKE = "remove it and run `collegium manifest`"

T = TypeVar("T")


class ManifestPathError(OSError):
    """The manifest cannot be written where it should go; the checkpoint is not at fault."""


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises CheckpointError naming the file if it is not one of this version, or was edited."""
    if not has_file(path):
        raise CheckpointError(f"manifest {path} does not exist: run `collegium manifest MODEL_DIR`")
    try:
        raw = read_json(path, limit_bytes=_FILE_BYTES, remedy=_REMAKE)
        if raw.get("version") != VERSION:
            raise CheckpointError(f"manifest {path} is of another version: {_REMAKE}")
        seal = raw.pop("seal", None)
        if seal != _seal_of(raw):
            raise CheckpointError(f"manifest {path} was edited or is damaged: its contents do not fit its seal")
        return _manifest(raw)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(_told(path, f"{error}")) from None
        raise CheckpointError(_told(path, f"manifest {path} cannot be read ({error!r})")) from None


def _told(path: Path, why: str) -> str:
    named = why if str(path) in why else f"manifest {path}: {why}"
    return named if _REMAKE in named else f"{named}; {_REMAKE}"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest whole or not at all. Raises ManifestPathError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    raw = json.loads(json.dumps({"version": VERSION, **asdict(manifest)}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"seal": _seal_of(raw), **raw}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ManifestPathError(f"{path} cannot be written: {error.strerror}; name another file") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _seal_of(raw: Mapping[str, object]) -> str:
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _manifest(raw: Mapping[str, object]) -> Manifest:
    form = _object(raw, "form")
    layers = tuple(_layer(one) for one in _list(raw, "layers"))
    if not layers or not all(layer.experts for layer in layers):
        raise CheckpointError("it names no experts")
    dtype = _text(raw, "dtype")
    if dtype not in ("float32", "bfloat16"):
        _refuse("dtype", dtype)
    num_shared, top_k = _whole(raw, "num_shared"), _whole(raw, "top_k", at_least=1)
    if num_shared >= min(top_k, *(len(layer.experts) for layer in layers)):
        _refuse("num_shared", num_shared)
    return Manifest(
        model_dir=_text(raw, "model_dir"),
        model_type=_text(raw, "model_type"),
        layout=Layout(_text(raw, "layout")),
        form=ExpertForm(
            activation=Activation(_text(form, "activation")),
            clamp=_number(form, "clamp"),
            alpha=_number(form, "alpha"),
            is_gated=_flag(form, "is_gated"),
        ),
        d_model=_whole(raw, "d_model", at_least=1),
        d_ffn=_whole(raw, "d_ffn", at_least=1),
        top_k=top_k,
        dtype=dtype,
        layers=layers,
        files={name: _file(name, value) for name, value in _object(raw, "files").items()},
        sources={name: _text(_object(raw, "sources"), name) for name in _object(raw, "sources")},
        stored_dtypes={name: tuple(_each(value, str, name)) for name, value in _object(raw, "stored_dtypes").items()},
        num_shared=num_shared,
    )


def _layer(raw: Mapping[str, object]) -> LayerEntry:
    return LayerEntry(
        decoder_layer=_whole(raw, "decoder_layer"), experts=tuple(_expert(one) for one in _list(raw, "experts"))
    )


def _expert(raw: Mapping[str, object]) -> ExpertEntry:
    tensors = tuple(_tensor_ref(one) for one in _list(raw, "tensors"))
    if not tensors:
        _refuse("tensors", raw["tensors"])
    return ExpertEntry(tensors=tensors, checksum=_text(raw, "checksum"))


def _tensor_ref(raw: Mapping[str, object]) -> TensorRef:
    shape = tuple(_each(raw["shape"], int, "shape"))
    dtype, name = _text(raw, "dtype"), _text(raw, "file")
    if dtype not in ITEM_BYTES or not shape or min(shape) < 1:
        _refuse("dtype or shape", raw)
    if not is_plain_name(name):
        _refuse("file", name)
    return TensorRef(
        file=name,
        key=_text(raw, "key"),
        role=Role(_text(raw, "role")),
        offset=_whole(raw, "offset"),
        shape=shape,
        dtype=dtype,
        row_bytes=_whole(raw, "row_bytes"),
    )


def _file(name: str, value: object) -> tuple[int, int]:
    size, mtime = _each(value, int, "files")
    if not is_plain_name(name):
        _refuse("files", name)
    return size, mtime


def _refuse(name: str, value: object) -> NoReturn:
    raise CheckpointError(f"its {name} is {value!r:.80}, which cannot be")


def _object(raw: Mapping[str, object], name: str) -> dict[str, object]:
    value = raw[name]
    return cast("dict[str, object]", value) if isinstance(value, dict) else _refuse(name, value)


def _list(raw: Mapping[str, object], name: str) -> list[dict[str, object]]:
    return cast("list[dict[str, object]]", _each(raw[name], dict, name))


def _each(value: object, kind: type[T], name: str) -> list[T]:
    """Read a list whose items are all of a kind."""
    found: list[T] = []
    for one in cast("list[object]", value) if isinstance(value, list) else _refuse(name, kind_of(value)):
        if not isinstance(one, kind) or isinstance(one, bool):
            _refuse(name, one)
        found.append(one)
    return found


def _text(raw: Mapping[str, object], name: str) -> str:
    value = raw[name]
    return value if isinstance(value, str) else _refuse(name, value)


def _whole(raw: Mapping[str, object], name: str, *, at_least: int = 0) -> int:
    value = raw[name]
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < 1 << 62:
        _refuse(name, value)
    return value


def _flag(raw: Mapping[str, object], name: str) -> bool:
    value = raw[name]
    return value if isinstance(value, bool) else _refuse(name, value)


def _number(raw: Mapping[str, object], name: str) -> float:
    value = raw[name]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _refuse(name, value)
