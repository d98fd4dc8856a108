"""Manifests find every expert's bytes; a damaged checkpoint is refused by the name of what is damaged."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from collegium.model.architectures import ARCHITECTURES, CheckpointError, UnsupportedModelError
from collegium.model.manifest import ManifestPathError, build_manifest, ensure_manifest, load_manifest
from collegium.model.weights import read_expert
from tests.checkpoints import Variant
from tests.oracle import Oracle


@pytest.fixture
def checkpoint(oracle: Oracle, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(oracle.checkpoint("mixtral"), copy)
    return copy


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_sharded_and_single_files_hold_the_same_experts(arch: str, oracle: Oracle) -> None:
    single = build_manifest(oracle.checkpoint(arch, Variant.BASE))
    sharded = build_manifest(oracle.checkpoint(arch, Variant.SHARDED))
    assert len(sharded.files) > 1
    assert single.digest == sharded.digest
    for layer in (0, len(single.layers) - 1):
        one = read_expert(single, layer, 1, torch.float32)
        other = read_expert(sharded, layer, 1, torch.float32)
        assert torch.equal(one.gate_up, other.gate_up)
        assert one.gate_up.shape == ((1 + single.form.is_gated) * single.d_ffn, single.d_model)
        assert one.down.shape == (single.d_model, single.d_ffn)


def test_a_cached_manifest_is_used_until_a_file_changes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[tuple[int, int]] = []
    first = ensure_manifest(checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    seen.clear()
    assert ensure_manifest(checkpoint, progress=lambda done, total: seen.append((done, total))) == first
    assert not seen
    (checkpoint / "model.safetensors").touch()
    ensure_manifest(checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert seen


def test_a_manifest_that_cannot_be_written_says_so_before_the_pass_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    before = sorted(tmp_path.iterdir())
    for out, why in ((tmp_path, "is a folder"), (tmp_path / "absent" / "m.json", "make it first")):
        with pytest.raises(ManifestPathError, match=why):
            ensure_manifest(checkpoint, out=out, progress=lambda done, total: seen.append((done, total)))
    assert not seen
    with pytest.raises(ManifestPathError, match="cannot be written"):
        ensure_manifest(checkpoint, out=tmp_path / ("x" * 250))  # too long a name for the partial file
    assert sorted(tmp_path.iterdir()) == before


def edit_config(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, checkpoint / "model.safetensors")


def reshape_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, checkpoint / "model.safetensors")


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_header(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 40) + b"{" * 40 + b"\0" * 1000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, r"expert 3 of decoder layer 1 lacks its down tensor"),
        (reshape_tensor, r"tensor model\.layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight has shape \[95, 64\]"),
        (truncate, r"ends inside tensor .*: the file is truncated"),
        (break_header, r"damaged safetensors header"),
        (lambda c: (c / "model.safetensors").unlink(), r"holds no \.safetensors file"),
        (lambda c: (c / "config.json").unlink(), r"config\.json is missing"),
        (lambda c: (c / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda c: edit_config(c, num_local_experts=9), r"expert 8 of decoder layer 0 lacks"),
        (lambda c: edit_config(c, model_type="gpt2"), r"'gpt2' is not supported; these are: .*mixtral"),
        (lambda c: edit_config(c, quantization_config={"bits": 4}), r"is quantized"),
        (lambda c: edit_config(c, hidden_act="mish"), r"hidden_act 'mish' is not supported"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: Callable[[Path], object], message: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        build_manifest(checkpoint)


def test_layers_beyond_the_config_are_not_served(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=2)
    assert [layer.decoder_layer for layer in build_manifest(checkpoint).layers] == [0, 1]


def test_bytes_that_changed_after_the_manifest_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    manifest = load_manifest(ensure_manifest(checkpoint, out=tmp_path / "manifest.json"))
    ref = manifest.layers[2].experts[4].tensors[1]
    with (checkpoint / ref.file).open("r+b") as file:
        file.seek(ref.offset + 8)
        file.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match="expert 4 of MoE layer 2 does not match its checksum"):
        read_expert(manifest, 2, 4, torch.float32)
    read_expert(manifest, 2, 5, torch.float32)
