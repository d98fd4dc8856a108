"""A router that cannot load says what failed, in which part, of which checkpoint; --device only for devices."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from collegium.fabric.errors import FailedPrecondition
from collegium.model.allocation import is_out_of_memory
from collegium.model.manifest import ManifestPathError
from expert_svc import app as worker_app
from expert_svc.settings import Settings as WorkerSettings
from router_svc import library_model, loading, model_loader
from router_svc.settings import Settings
from tests.oracle import Oracle


def failing(error: BaseException) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


def test_a_device_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    for device in ("cuda:63", "nonsense", "meta"):
        with pytest.raises(FailedPrecondition) as caught:
            loading.load(Settings(model=tmp_path / "absent", device=device))
        assert (caught.value.field, caught.value.reason) == ("--device", "UNUSABLE_DEVICE")


def test_a_torch_without_cuda_is_told_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    settings: dict[str, Any] = {"device": "cuda:0"}
    for choose in (
        lambda: loading.load(Settings(model=tmp_path / "absent", **settings)),
        lambda: worker_app.choose_device(WorkerSettings(balancer="127.0.0.1:1", manifest=tmp_path, **settings)),
    ):
        with pytest.raises(
            FailedPrecondition, match=r"the installed torch 9\.9\.9\+cpu is a build without CUDA"
        ) as caught:
            choose()
        assert (caught.value.field, caught.value.reason) == ("--device", "UNUSABLE_DEVICE")
        assert "install a build of torch for CUDA" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("where", "error", "reason", "field", "words"),
    [
        (
            "probe_cache",
            TypeError("unsupported operand"),
            "UNUSABLE_CHECKPOINT",
            "--model",
            "cannot compute a token with",
        ),
        ("number_layers", KeyError("x"), "UNUSABLE_CHECKPOINT", "--model", "cannot compute a token with"),
        ("probe_cache", ZeroDivisionError("division by zero"), "UNUSABLE_CHECKPOINT", "--model", "ZeroDivisionError"),
        (
            "probe_cache",
            RuntimeError("shape '[1]' is invalid"),
            "UNUSABLE_CHECKPOINT",
            "--model",
            "shape '[1]' is invalid",
        ),
        ("probe_cache", MemoryError(), "OUT_OF_MEMORY", "--model", "attention, gates and embeddings of"),
        ("_move", torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY", "--model", "not enough memory on cpu"),
        ("_move", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "OUT_OF_MEMORY", "--model", "in float32"),
        ("_move", model_loader.DeviceFailedError("no kernel image"), "UNUSABLE_DEVICE", "--device", "no kernel image"),
    ],
)
def test_what_fails_while_a_model_loads_is_told_as_what_it_is(
    where: str,
    error: Exception,
    reason: str,
    field: str,
    words: str,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = oracle.checkpoint("qwen2_moe")  # loaded by transformers, and here computed by its classes as well
    monkeypatch.setattr(model_loader if where == "_move" else library_model, where, failing(error))
    with pytest.raises(FailedPrecondition) as caught:
        loading.load(Settings(model=checkpoint, threads=1, modelling="transformers"))
    told = caught.value
    assert (told.reason, told.field) == (reason, field)
    assert words in told.message
    assert str(checkpoint) in told.message or field == "--device"
    assert "cuda:N" not in told.message or field == "--device"


def test_a_cache_that_cannot_be_written_is_told_as_such(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ensure_manifest", failing(ManifestPathError("x.json cannot be written")))
    with pytest.raises(FailedPrecondition) as caught:
        loading.load(Settings(model=oracle.checkpoint("mixtral")))
    assert (caught.value.reason, caught.value.field) == ("MANIFEST_PATH", "XDG_CACHE_HOME")


def test_a_config_that_transformers_cannot_run_names_the_checkpoint(oracle: Oracle, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(oracle.checkpoint("mixtral"), folder)
    path = folder / "config.json"
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}  # lacks what llama3 needs
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(FailedPrecondition) as caught:
        loading.load(Settings(model=folder, threads=1))
    assert (caught.value.reason, caught.value.field) == ("UNUSABLE_CHECKPOINT", "--model")
    assert "config.json" in caught.value.message


def test_a_lack_of_memory_is_found_behind_other_errors() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("cannot load") from error
    except ValueError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(ValueError("out of memory"))  # a text that says so is none
    assert not is_out_of_memory(RuntimeError("shapes differ"))
