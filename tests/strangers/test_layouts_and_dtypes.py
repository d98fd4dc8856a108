"""Both layouts of a checkpoint are one model, and its weights are served in a type that holds them, or it is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.one_process import OneProcess, Request
from collegium.model.architectures import Layout
from collegium.model.manifest import build_manifest, ensure_manifest
from collegium.model.served_dtype import auto_dtype, tell_dtype
from collegium.model.weights import read_expert
from router_svc import loading
from router_svc.loading import load
from router_svc.settings import Settings
from tests.checkpoints import DECODERS, Variant
from tests.oracle import Oracle

TOLD_OF_HALF = "stored as float16 and served as float32"


@pytest.mark.parametrize("arch", DECODERS)
def test_workers_read_the_same_experts_from_both_layouts(arch: str, oracle: Oracle) -> None:
    published, fused = (build_manifest(oracle.checkpoint(arch, v)) for v in (Variant.BASE, Variant.FUSED))
    kept = {"gpt_oss": Layout.FUSED_TRANSPOSED, "dbrx": Layout.STACKED}  # transformers has but one
    assert fused.layout == kept.get(arch, Layout.FUSED)
    for layer in range(len(published.layers)):
        for expert in (0, len(published.layers[0].experts) - 1):
            one, other = (read_expert(manifest, layer, expert, torch.float32) for manifest in (published, fused))
            for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
                ours, theirs = getattr(one, name), getattr(other, name)
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "arch",
    [a if a in ("mixtral", "phimoe", "granitemoe") else pytest.param(a, marks=pytest.mark.soak) for a in DECODERS],
)
def test_tokens_of_the_fused_layout_equal_plain_transformers(arch: str, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch, Variant.FUSED)
    references = oracle.choose_prompts(checkpoint, 2, 8)
    with OneProcess(checkpoint, num_workers=2) as cluster:
        answers = cluster.run([Request(prompt_ids=r.prompt_ids, max_tokens=8) for r in references])
    assert [choice.token_ids for (choice,) in answers] == [r.token_ids for r in references]


def as_type(source: Path, folder: Path, dtype: torch.dtype, only: str = "") -> Path:
    """Copy a checkpoint with the weights whose names hold `only` cast to another type."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    cast = {key: t.to(dtype) if only in key and t.is_floating_point() else t for key, t in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def test_float16_weights_are_served_exactly_and_it_is_said_once(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(type(loading._log), "warning", lambda _, event, **__: said.append(event))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = as_type(oracle.checkpoint("mixtral"), tmp_path / "half", torch.float16)
    ensure_manifest(half)
    model, manifest = load(Settings(model=half, threads=1))
    assert (manifest.dtype, model.dtype) == ("float32", torch.float32)
    stored = load_file(half / "model.safetensors")
    embedding = model.model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(embedding, stored["model.embed_tokens.weight"].float())
    expert = read_expert(manifest, 0, 1, model.dtype)
    assert torch.equal(expert.down, stored["model.layers.0.block_sparse_moe.experts.1.w2.weight"].float())
    assert [line for line in said if TOLD_OF_HALF in line] == said[:1]
    said.clear()
    load(Settings(model=half, threads=1, dtype="float32"))
    assert not said  # asked for


@pytest.mark.parametrize(
    ("experts", "router", "dtype", "told"),
    [
        (["F32"], ["F32"], "float32", ""),
        (["BF16"], ["BF16"], "bfloat16", ""),
        (["F16"], ["F16"], "float32", TOLD_OF_HALF),
        (["BF16", "F16"], ["BF16"], "float32", "stored as bfloat16 and float16 and served as float32"),
        (["BF16", "F32"], ["BF16"], "float32", "stored as bfloat16 and float32 and served as float32"),
        (["BF16"], ["BF16", "F32"], "bfloat16", "matrices are stored as float32 and rounded to bfloat16"),
        (["BF16"], ["F16"], "bfloat16", "matrices are stored as float16 and rounded to bfloat16"),
    ],
)
def test_what_auto_chooses_is_told_where_it_is_not_what_is_stored(
    experts: list[str], router: list[str], dtype: str, told: str
) -> None:
    assert auto_dtype(experts) == dtype
    said = tell_dtype({"experts": experts, "router": router}, dtype)
    assert told in said
    assert bool(told) == bool(said)


def test_mixed_types_are_found_in_the_files(oracle: Oracle, tmp_path: Path) -> None:
    mixed = as_type(oracle.checkpoint("mixtral", Variant.BF16), tmp_path / "mixed", torch.float32, only="self_attn")
    manifest = build_manifest(mixed)
    assert manifest.stored_dtypes == {"experts": ("BF16",), "router": ("BF16", "F32")}
    assert manifest.dtype == "bfloat16"
    assert tell_dtype(manifest.stored_dtypes, manifest.dtype)
