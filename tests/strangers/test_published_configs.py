"""Configurations as published checkpoints have them pass the checks, with fields that nobody here knows in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collegium.model.architectures import ARCHITECTURES
from collegium.model.config_fields import check_config
from router_svc.lengths import served_positions
from router_svc.model_loader import config_of

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published" / "configs.json").read_text())
POSITIONS = {
    "Mixtral-8x7B": 32_768,
    "Qwen3-30B-A3B": 40_960,
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
}


def test_there_is_one_of_each_architecture() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_published_configuration_is_taken_and_served_at_its_length(name: str) -> None:
    check_config(Path("config.json"), CONFIGS[name])
    assert served_positions(config_of(CONFIGS[name])) == POSITIONS[name]
