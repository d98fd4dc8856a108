"""A model of the family that is read as it lies is the one that transformers loads; others are left to transformers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from collegium.model import native
from collegium.model.architectures import read_config
from collegium.model.checkpoint_survey import survey_checkpoint
from router_svc import library_model, programs
from router_svc.family_config import plain_config
from router_svc.family_loading import FamilyModel, load_family_model
from router_svc.lengths import served_positions
from router_svc.model_loader import load_router_model
from tests.checkpoints import Variant
from tests.oracle import Oracle

FAMILY = ("mixtral", "olmoe", "qwen3_moe")
DEMO = Path(__file__).parents[2] / "models" / "demo-lm"
CPU = torch.device("cpu")

Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def read(folder: Path, dtype: torch.dtype) -> FamilyModel | None:
    survey, config = survey_checkpoint(folder), plain_config(read_config(folder))
    return config and load_family_model(folder, config, survey.router, survey.num_experts, dtype)


def assert_same(one: object, other: object) -> None:
    """Two dataclasses of dataclasses, tensors and values."""
    for field in dataclasses.fields(cast(Any, other)):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(theirs):
            assert_same(ours, theirs)
        else:
            same = torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
            assert same, field.name


def assert_same_model(folder: Path, dtype: torch.dtype) -> None:
    config = library_model.config_of(read_config(folder))
    ours, theirs = read(folder, dtype), cast(Any, library_model.load_library_model(folder, config, dtype))
    assert ours is not None
    read_by_us, read_by_them = (programs.outside(model) for model in (ours, theirs))
    for one, other in zip(read_by_us.layers, read_by_them.layers, strict=True):
        assert_same(programs.weights_of(read_by_us, one), programs.weights_of(read_by_them, other))
    assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.norm.weight, theirs.model.norm.weight)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {dtype}
    positions = torch.arange(served_positions(config))[None]
    for rotated, expected in zip(*(m.model.rotary_emb(torch.empty(1), positions) for m in (ours, theirs)), strict=True):
        assert torch.equal(rotated, expected)
    assert served_positions(ours.config) == served_positions(config)
    assert ours.config.eos_token_id == config.eos_token_id
    assert ours.config.vocab_size == config.vocab_size


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        *(
            (arch, variant)
            for arch in FAMILY
            for variant in (Variant.BASE, Variant.OTHER, Variant.SHARDED, Variant.BF16)
        ),
        ("olmoe", Variant.FUSED),
        ("qwen3_moe", Variant.FUSED),
    ],
)
def test_what_is_read_as_it_lies_is_what_transformers_loads(arch: str, variant: Variant, oracle: Oracle) -> None:
    dtype = torch.float32 if variant in (Variant.BASE, Variant.BF16) else torch.bfloat16  # stored, widened, rounded
    assert_same_model(oracle.checkpoint(arch, variant), dtype)


def test_so_is_the_demo_model() -> None:
    assert_same_model(DEMO, torch.bfloat16)


def edited(
    folder: Path,
    to: Path,
    fields: Callable[[Fields], object] = lambda _: None,
    tensors: Callable[[Tensors], object] = lambda _: None,
) -> Path:
    shutil.copytree(folder, to)
    (to / "config.json").chmod(0o644)
    config = json.loads((to / "config.json").read_text())
    fields(config)
    (to / "config.json").write_text(json.dumps(config))
    weights = load_file(to / "model.safetensors")
    tensors(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("arch", FAMILY)
def test_configs_of_the_older_spelling_and_with_biases_are_read_as_well(
    arch: str, oracle: Oracle, tmp_path: Path
) -> None:
    def spell(config: Fields) -> None:
        config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
        config["rope_scaling"] = None
        if arch != "mixtral":
            config["attention_bias"] = True

    def add_biases(tensors: Tensors) -> None:
        if arch != "mixtral":
            for key, value in list(tensors.items()):
                if "_proj.weight" in key and "self_attn" in key:
                    tensors[key.replace(".weight", ".bias")] = torch.linspace(-1, 1, value.shape[0])

    folder = edited(oracle.checkpoint(arch), tmp_path / "model", spell, add_biases)
    assert_same_model(folder, torch.float32)


def without(name: str) -> Callable[[Fields], object]:
    return lambda config: config.pop(name)


def with_fields(**fields: object) -> Callable[[Fields], object]:
    return lambda config: config.update(fields)


LEFT_TO_TRANSFORMERS: dict[str, Callable[[Fields], object]] = {
    "a number that the file leaves to the library": without("rms_norm_eps"),
    "a truth that the file leaves to the library": without("tie_word_embeddings"),
    "no base of the rotation": without("rope_parameters"),
    "a scaled rotation": with_fields(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "two bases": with_fields(rope_theta=5e3),
    "a part of each head": with_fields(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "a field of another architecture": with_fields(embedding_multiplier=2.0),
    "kinds of layers": with_fields(layer_types=["full_attention"] * 3),
    "layers without experts": with_fields(mlp_only_layers=[0]),
    "experts in every second layer": with_fields(decoder_sparse_step=2),
    "another architecture": with_fields(model_type="qwen2_moe"),
}


@pytest.mark.parametrize("what", sorted(LEFT_TO_TRANSFORMERS))
def test_a_config_that_is_not_plain_is_left_to_transformers(what: str, oracle: Oracle) -> None:
    fields = read_config(oracle.checkpoint("qwen3_moe"))
    assert plain_config(fields) is not None
    LEFT_TO_TRANSFORMERS[what](fields)
    assert plain_config(fields) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("lm_head.weight"),
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.more.weight": torch.zeros(64)}),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}),
    ],
    ids=["no head", "no last norm", "one more", "another width"],
)
def test_files_with_other_tensors_are_left_to_transformers(
    change: Callable[[Tensors], object], oracle: Oracle, tmp_path: Path
) -> None:
    folder = edited(oracle.checkpoint("qwen3_moe"), tmp_path / "model", tensors=change)
    assert read(folder, torch.float32) is None


@pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")
@pytest.mark.parametrize("modelling", ["auto", "device", "transformers"])
def test_the_library_is_asked_where_its_classes_compute_and_not_otherwise(modelling: str, oracle: Oracle) -> None:
    model = load_router_model(oracle.checkpoint("olmoe"), torch.float32, CPU, modelling)
    assert isinstance(model.model, FamilyModel) == (modelling != "transformers")
    in_memory = load_router_model(oracle.checkpoint("mixtral", Variant.FUSED), torch.float32, CPU)
    assert not isinstance(in_memory.model, FamilyModel)  # its gates have other names
    assert in_memory.lean is not None
