"""`collegium plan`: what it reads, what it prints, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from collegium.cli.main import build
from collegium.fabric.errors import InvalidArgument

LOADS = np.random.default_rng(3).lognormal(0, 1, (3, 16))


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(LOADS.tolist()))
    return path


def run(*args: object) -> str:
    result = CliRunner().invoke(build(["plan"]), ["plan", *map(str, args)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def plan(*args: object) -> dict[str, Any]:
    return json.loads(run(*args, "--json"))


def test_a_plan_says_how_even_it_is_and_where_every_expert_goes(loads: Path) -> None:
    said = plan("--loads", loads, "--workers", 4, "--slots", 20, "--repeat", 3)
    assert set(said) == {"policy", "max_over_mean", "milliseconds", "moves", "placement"}
    assert said["policy"] == "replicated"
    assert len(said["max_over_mean"]) == 3 and max(said["max_over_mean"]) < 1.2
    for layer, row in zip(LOADS, said["placement"], strict=True):
        assert sorted({e for worker in row for e in worker}) == list(range(16))
        copies = [sum(e in worker for worker in row) for e in range(16)]
        work = [sum(layer[e] / copies[e] for e in worker) for worker in row]
        assert max(work) / (sum(work) / 4) == pytest.approx(said["max_over_mean"][LOADS.tolist().index(layer.tolist())])


def test_from_a_former_plan_only_what_is_needed_moves_and_why_is_told(loads: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps(plan("--loads", loads, "--workers", 4, "--slots", 20)))
    same = plan("--loads", loads, "--workers", 4, "--slots", 20, "--from", before, "--target", 1.3, "--explain")
    assert same["moves"] == 0
    assert same["reasons"] == ["no move: every layer is at 1.3 of the mean or below"]
    drifted = tmp_path / "drifted.json"
    drifted.write_text(json.dumps((LOADS * np.random.default_rng(4).lognormal(0, 0.5, LOADS.shape)).tolist()))
    after = plan("--loads", drifted, "--workers", 4, "--slots", 20, "--from", before, "--target", 1.1, "--explain")
    assert 0 < after["moves"] < 30
    assert after["moves"] == sum(reason.count("to worker") for reason in after["reasons"])
    few = plan("--loads", drifted, "--workers", 4, "--slots", 20, "--from", before, "--max-moves", 2, "--explain")
    assert few["moves"] <= 2 and any("budget" in reason for reason in few["reasons"])
    again = plan("--loads", drifted, "--workers", 4, "--slots", 20, "--from", before, "--policy", "eplb")
    assert again["moves"] > after["moves"]


def test_a_worker_that_is_gone_is_planned_around(loads: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps(plan("--loads", loads, "--workers", 5, "--slots", 20)))
    said = plan("--loads", loads, "--workers", 4, "--slots", 20, "--from", before)
    assert {e for row in said["placement"] for worker in row for e in worker} == set(range(16))


def test_the_table_names_every_layer_and_explains_itself(loads: Path) -> None:
    text = run("--loads", loads, "--workers", 2, "--slots", 16, "--policy", "greedy", "--explain")
    assert "max/mean" in text and "planned from nothing by greedy" in text


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (("--workers", 4, "--slots", 15), "--slots"),
        (("--workers", 1, "--slots", 16, "--policy", "best"), "--policy"),
        (("--workers", 2, "--slots", 16, "--speeds", "1"), "--speeds"),
        (("--workers", 2, "--slots", 16, "--speeds", "1,x"), "--speeds"),
        (("--workers", 2, "--slots", 16, "--speeds", "1,nan"), "--speeds"),
        (("--workers", 2, "--slots", 16, "--domains", "a"), "--domains"),
        (("--workers", 2, "--slots", 16, "--from", "/nowhere"), "--from"),
    ],
)
def test_a_wrong_option_is_named(loads: Path, args: tuple[object, ...], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        run("--loads", loads, *args)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[[1, 2], [3]]",
        "[[1, -2]]",
        "[[1, NaN]]",
        "[[1e308, 1e308]]",
        "[[" + "9" * 400 + ", 1]]",
        '[["a"]]',
        "[1, 2]",
    ],
)
def test_loads_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        run("--loads", path, "--workers", 1, "--slots", 2)
    assert caught.value.field == "--loads"


@pytest.mark.parametrize(
    "text", ["[[[0]]]", '{"placement": 3}', "{}", json.dumps([[[99], []]] * 3), "[[[1e999]]]", '"x"']
)
def test_a_former_plan_that_does_not_fit_is_refused(loads: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "before.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        run("--loads", loads, "--workers", 2, "--slots", 16, "--from", path)
    assert caught.value.field == "--from"
