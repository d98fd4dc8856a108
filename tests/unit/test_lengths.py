"""A model's length is what its rotary scaling makes it, whichever way config.json says it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from collegium.fabric.errors import FailedPrecondition
from router_svc.app import plan_memory
from router_svc.lengths import served_positions
from router_svc.model_loader import load_router_model
from router_svc.settings import Settings
from tests.oracle import Oracle

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("told", "rope", "length"),
    [
        (128, None, 128),
        (128, YARN | {ORIGINAL: 128}, 512),  # as model cards tell
        (160, YARN | {ORIGINAL: 128}, 512),  # Qwen3's cards: more is told than was trained
        (512, YARN | {ORIGINAL: 128}, 512),  # scaled already: DeepSeek-V3, gpt-oss
        (128, {"type": "yarn", "factor": 4, ORIGINAL: 128}, 512),  # the older name of the field
        (128, YARN, 512),
        (128, YARN | {"factor": 2.5, ORIGINAL: 128}, 320),
        (128, {"rope_type": "linear", "factor": 2.0}, 256),
        (256, {"rope_type": "linear", "factor": 2.0, ORIGINAL: 128}, 256),
        (512, {"rope_type": "llama3", ORIGINAL: 128} | LLAMA3, 512),
        (512, {"rope_type": "longrope", ORIGINAL: 128, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, 128),
    ],
)
def test_a_length_is_scaled_once(told: int, rope: dict[str, Any] | None, length: int, tmp_path: Path) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        given = {"max_position_embeddings": told, field: rope and dict(rope)}
        config = AutoConfig.for_model("qwen3_moe", hidden_size=64, num_attention_heads=4, head_dim=16, **given)
        config.save_pretrained(tmp_path)
        assert served_positions(config) == length
        assert served_positions(AutoConfig.from_pretrained(tmp_path)) == length


def test_the_shortest_kind_of_layer_decides() -> None:
    rope = {"full_attention": YARN | {ORIGINAL: 128}, "sliding_attention": {"rope_type": "default"}}
    config = cast(PreTrainedConfig, SimpleNamespace(max_position_embeddings=200, rope_parameters=rope))
    assert served_positions(config) == 200


def test_a_length_above_the_models_is_refused_with_what_would_help(oracle: Oracle, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(oracle.checkpoint("mixtral"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]  # an older config, as those are that cards tell to change
    scaling = {"rope_theta": 1e6, "rope_scaling": YARN | {ORIGINAL: 128}, "max_position_embeddings": 128}
    path.write_text(json.dumps(config | scaling))
    model = load_router_model(folder, torch.float32, torch.device("cpu"))
    assert model.max_positions == 512
    settings = Settings(model=folder, max_model_len=512)
    assert plan_memory(settings, model)[1] == 512
    with pytest.raises(FailedPrecondition, match=r"more than the model's 512 positions.* give at most 512") as caught:
        plan_memory(Settings(model=folder, max_model_len=513), model)
    assert "rope_scaling" in caught.value.message
