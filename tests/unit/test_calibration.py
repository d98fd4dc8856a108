"""Calibration: what is measured is kept, what cannot be read is measured anew, and noise does not choose."""

import json
from pathlib import Path

import pytest
import torch

from collegium.model import cache_root, calibration
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.calibration import ROWS, calibrate, choose, measure, settle_kernel
from collegium.model.kernels import Kernel, KernelUnavailableError, available, kernel_for
from expert_svc.settings import Settings as WorkerSettings
from router_svc.settings import Settings as RouterSettings

FORM = ExpertForm(activation=Activation.SILU)
NO_CHOICE = len(available(torch.float32)) < 3  # native, onednn, torch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "collegium" / "kernels.json"


def test_others_are_taken_only_where_they_are_clearly_faster() -> None:
    ours = {"1": 100.0, "64": 400.0}
    assert choose({"native": ours, "onednn": {"1": 95.0, "64": 390.0}}) is Kernel.NATIVE
    assert choose({"native": ours, "onednn": {"1": 120.0, "64": 100.0}}) is Kernel.ONEDNN
    assert choose({"onednn": ours}) is Kernel.ONEDNN


def test_every_kernel_is_measured_at_every_row_count_and_the_choice_of_the_process_is_left() -> None:
    before = kernel_for(torch.float32)
    found = measure(32, 48, torch.float32, FORM)
    assert set(found.microseconds) == {k.value for k in available(torch.float32)} - {"torch"} or NO_CHOICE
    for by_rows in found.microseconds.values():
        assert list(by_rows) == [str(rows) for rows in ROWS]
        assert all(us > 0 for us in by_rows.values())
    assert kernel_for(torch.float32) is before


@pytest.mark.skipif(NO_CHOICE, reason="there is one kernel here")
def test_a_machine_is_measured_once_for_each_shape(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate(32, 48, torch.float32, FORM)
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("it was measured again"))
    assert calibrate(32, 48, torch.float32, FORM) == first
    entry = json.loads(cache.read_text())
    assert [e["kernel"] for e in entry.values()] == [first.kernel.value]
    with pytest.raises(BaseException, match="measured again"):
        calibrate(32, 64, torch.float32, FORM)


@pytest.mark.skipif(NO_CHOICE, reason="there is one kernel here")
@pytest.mark.parametrize("text", ["", "[]", "{", '{"KEY": 5}', '{"KEY": {"machine": 1, "kernel": "abacus"}}'])
def test_a_cache_that_cannot_be_read_costs_a_measurement(
    cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    first = calibrate(32, 48, torch.float32, FORM)
    (key,) = json.loads(cache.read_text())
    cache.write_text(text.replace("KEY", key.replace('"', "")))
    monkeypatch.setattr(calibration, "measure", lambda *_: first)
    assert calibrate(32, 48, torch.float32, FORM) == first
    assert json.loads(cache.read_text())[key]["kernel"] == first.kernel.value


def test_without_a_place_to_remember_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> Path:
        raise OSError("no folder can be written")

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(cache_root, "_temporary", no_folder)
    assert calibrate(32, 48, torch.float32, FORM).kernel in available(torch.float32)


def test_what_was_asked_for_is_used_or_refused() -> None:
    before = kernel_for(torch.float32)
    try:
        assert settle_kernel("torch", 32, 48, torch.float32, FORM).kernel is kernel_for(torch.float32) is Kernel.TORCH
        with pytest.raises(KernelUnavailableError, match="float16"):
            settle_kernel("onednn", 32, 48, torch.float16, FORM)
    finally:
        settle_kernel(before.value, 32, 48, torch.float32, FORM)


@pytest.mark.parametrize("settings", [WorkerSettings, RouterSettings], ids=["worker", "router"])
def test_the_settings_offer_every_kernel(settings: type) -> None:
    field = settings.__dataclass_fields__["kernel"]
    (meta,) = (value for value in field.metadata.values() if hasattr(value, "choices"))
    assert meta.choices == ("auto", *(kernel.value for kernel in Kernel))
