"""Configurations as published checkpoints have them pass the checks, with fields that nobody here knows in them."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from collegium.model.architectures import ARCHITECTURES, expert_form
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.config_fields import NOT_USED, USED, check_config
from collegium.model.encoder_decoder import MODEL_TYPES, read_encoder_decoder
from router_svc.lengths import served_positions
from router_svc.library_model import config_of
from tests.checkpoints import DECODERS

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published" / "configs.json").read_text())
POSITIONS = {
    "Mixtral-8x7B": 32_768,
    "Qwen3-30B-A3B": 40_960,
    "Qwen3-Coder-30B-A3B": 262_144,
    "DeepSeek-V3": 163_840,
    "DeepSeek-V2-Lite": 163_840,
    "gpt-oss-20b": 131_072,
    "Phi-3.5-MoE": 4_096,  # as far as its short factors go
    "DBRX": 32_768,
    "GLM-4.5-Air": 131_072,
    "granite-3.0-1b-a400m": 4_096,
    "MiniMax-M2": 196_608,
    "OLMoE-1B-7B": 4_096,
    "Qwen1.5-MoE-A2.7B": 8_192,
    "ERNIE-4.5-21B-A3B": 131_072,
    "Hunyuan-A13B": 32_768,
    "dots.llm1": 32_768,
}


# Fields of facebook/nllb-moe-54b and google/switch-base-8, by their model cards and papers.
TRANSLATORS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published" / "encoder_decoder.json").read_text()
)


def test_there_is_one_of_each_architecture() -> None:
    assert {config["model_type"] for config in (CONFIGS | TRANSLATORS).values()} == set(ARCHITECTURES)
    assert {config["model_type"] for config in TRANSLATORS.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("name", "layers", "width", "top_k"),
    [("NLLB-MoE-54B", (6, 6), 128, 2), ("Switch-base-8", (6, 6), 64, 1)],
)
def test_a_published_configuration_with_an_encoder_is_taken(
    name: str, layers: tuple[int, int], width: int, top_k: int
) -> None:
    config = read_encoder_decoder(TRANSLATORS[name])
    assert (len(config.encoder.sparse), len(config.decoder.sparse)) == layers
    assert (config.head_width, config.top_k) == (width, top_k)
    assert not expert_form(TRANSLATORS[name]).is_gated


@pytest.mark.parametrize("arch", DECODERS)
def test_no_field_that_the_modelling_classes_read_is_kept_from_them(arch: str) -> None:
    source = inspect.getsource(importlib.import_module(f"transformers.models.{arch}.modeling_{arch}"))
    known = CONFIG_MAPPING[arch]().to_dict()
    for nested in [value for value in known.values() if isinstance(value, dict)]:
        known |= nested
    read = set(re.findall(r"(?<=config\.)\w+", source)) | set(re.findall(r"config, \"(\w+)\"", source))
    assert len(read & known.keys()) > 8
    assert not (read & known.keys()) - USED - set(NOT_USED)


@pytest.mark.parametrize("value", [None, 2, 1.0])
def test_a_nested_field_reaches_the_model_as_it_is(value: object) -> None:
    fields = json.loads(json.dumps(CONFIGS["DBRX"]))
    fields["ffn_config"]["moe_normalize_expert_weights"] = value
    check_config(Path("config.json"), fields)
    assert config_of(fields).ffn_config.moe_normalize_expert_weights == value  # pyright: ignore[reportAttributeAccessIssue]


def test_a_shared_expert_of_no_width_is_refused_where_there_is_one() -> None:
    fields = CONFIGS["Qwen1.5-MoE-A2.7B"] | {"shared_expert_intermediate_size": 0}
    with pytest.raises(CheckpointError, match="shared_expert_intermediate_size is 0"):
        check_config(Path("config.json"), fields)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_published_configuration_is_taken_and_served_at_its_length(name: str) -> None:
    check_config(Path("config.json"), CONFIGS[name])
    assert served_positions(config_of(CONFIGS[name])) == POSITIONS[name]
