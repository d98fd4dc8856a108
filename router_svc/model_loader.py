"""Load a checkpoint's attention, gates and embeddings, and say what computes the forward pass.

Owns the choice between the two ways to a RouterModel: a model of the commonest family is read as it lies
(family_loading);
every other one, and whatever is out of the ordinary, comes through the model library (library_model), which is imported
then and not before.
"""

import contextlib
import re
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collegium.fabric import logs
from collegium.model import native
from collegium.model.allocation import first_line, is_out_of_memory
from collegium.model.architectures import UnsupportedModelError, read_config
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.checkpoint_survey import Survey, survey_checkpoint
from collegium.model.config_fields import check_generation_config
from collegium.model.encoder_decoder import MODEL_TYPES, NLLB, dropped_by_transformers, read_encoder_decoder
from collegium.model.kernels import pack_linears
from router_svc import lean, programs
from router_svc.device_model import DeviceModel
from router_svc.encoder_decoder import EncoderDecoderModel
from router_svc.family_config import plain_config
from router_svc.family_loading import FamilyModel, load_family_model
from router_svc.lean import LeanModel
from router_svc.lengths import served_positions
from router_svc.remote_experts import RemoteExperts
from router_svc.router_model import OwnPass, RouterModel

_log = logs.get("model")


class DeviceFailedError(RuntimeError):
    """The device refused the model's tensors; neither the checkpoint nor a lack of memory is at fault."""


def load_router_model(
    model_dir: Path, dtype: torch.dtype, device: torch.device, modelling: str = "auto", num_shared: int = 0
) -> RouterModel:
    """Load a checkpoint without experts and learn its cache's shapes. Process-global while it runs: one load at a time.

    `modelling` "transformers": compute with the modelling classes even where it could be done leanly; "device": as on a
    GPU, whatever the device is, which is for tests. num_shared: the manifest's, where workers compute shared experts.
    Raises UnsupportedModelError, or CheckpointError naming the file and the first field or tensor that is wrong, or the
    part that transformers could not do; DeviceFailedError; whatever torch raises if memory cannot be had.
    """
    survey = survey_checkpoint(model_dir)  # before a library reads what it does not bound
    generation = check_generation_config(model_dir)
    fields = read_config(model_dir)
    path = model_dir / "config.json"
    is_on_device = modelling == "device" or device.type != "cpu"
    what = f"attention, gates and embeddings of {model_dir} cannot be loaded as its config.json says"
    if survey.model_type in MODEL_TYPES:
        with _told_as(what):
            return _load_encoder_decoder(model_dir, fields, survey, generation, dtype, device)
    model: Any = None
    if modelling != "transformers":
        with _told_as(what):
            model = _read_as_it_lies(model_dir, fields, survey, dtype, is_on_device)
    library: Any = None
    if model is None:
        from router_svc import library_model as library

        with _told_as(f"{path} is not usable"):
            config = library.config_of(fields)
        with _told_as(what):
            model = library.load_library_model(model_dir, config, dtype)
    with _told_as(f"transformers cannot compute a token with {path}"):
        if library is not None:
            library.number_layers(model)
        model.eval().requires_grad_(False)
        _move(model, device)
        leanly, why = _own_pass(model, modelling, is_on_device, num_shared)
        if library is not None and leanly is None:
            library.prepare(model)
        if device.type == "cpu":
            pack_linears(model)
        cache_shapes = leanly.cache_shapes if leanly else library.probe_cache(model, device)
    _log.info("forward pass", by="collegium" if leanly else "transformers", why=why or "it has a program for the model")
    vocab_size = int(model.config.vocab_size)
    return RouterModel(
        model=model,
        model_type=survey.model_type,
        dtype=dtype,
        device=device,
        vocab_size=vocab_size,
        max_positions=served_positions(model.config),
        num_experts=survey.num_experts + num_shared,
        top_k=survey.top_k + num_shared,
        num_shared=num_shared,
        eos_ids=_eos_ids(model, generation),
        cache_shapes=cache_shapes,
        moe_layers=_moe_layers(model),
        lean=leanly,
    )


def _load_encoder_decoder(
    model_dir: Path,
    fields: Mapping[str, object],
    survey: Survey,
    generation: Mapping[str, object],
    dtype: torch.dtype,
    device: torch.device,
) -> RouterModel:
    if device.type != "cpu":
        raise UnsupportedModelError(f"{survey.model_type} is served with attention on a CPU alone; use --device=cpu")
    if native.library() is None:
        raise UnsupportedModelError(
            f"{survey.model_type} needs the native kernels, which cannot be used here; the log has why"
        )
    config = read_encoder_decoder(fields, model_dir / "config.json")
    said = generation or fields  # as `generate` does: config.json speaks where there is no generation_config.json
    where = model_dir / ("generation_config.json" if generation else "config.json")
    start_id = _id_of(generation, "decoder_start_token_id", where, config.vocab_size)
    if start_id is not None:
        config = replace(config, start_id=start_id)
    model = EncoderDecoderModel(model_dir, config, fields, survey.router, dtype)
    model.eval().requires_grad_(False)
    _log.info("forward pass", by="collegium", why="it has an encoder")
    if drops := dropped_by_transformers(fields):
        _log.warning("no token is dropped here, whatever config.json says", transformers=drops)
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = fields.get("eos_token_id", 2 if survey.model_type == NLLB else 1)
    return RouterModel(
        model=model,
        model_type=survey.model_type,
        dtype=dtype,
        device=device,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        num_experts=survey.num_experts,
        top_k=survey.top_k,
        eos_ids=_ids_of(eos, config.vocab_size),
        cache_shapes=model.cache_shapes,
        moe_layers=config.moe_layers,
        both=config,
        forced_id=_id_of(said, "forced_bos_token_id", where, config.vocab_size),
        lean=model,
    )


@contextlib.contextmanager
def _told_as(what: str) -> Generator[None]:
    """Raise whatever a library raises as a CheckpointError that begins with `what`.

    The libraries validate and compute with exceptions of many classes, Exception itself among them. A lack of memory
    passes through, and what already names its part.
    """
    try:
        yield
    except (CheckpointError, UnsupportedModelError, DeviceFailedError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def _read_as_it_lies(
    model_dir: Path, fields: Mapping[str, object], survey: Survey, dtype: torch.dtype, is_on_device: bool
) -> FamilyModel | None:
    """Read a model of the commonest family without the library; None if it is none, or cannot be computed so."""
    config = plain_config(fields)
    if config is None or (not is_on_device and lean.why_not_here(dtype)):
        return None
    return load_family_model(model_dir, config, survey.router, survey.num_experts, dtype)


def _move(model: nn.Module, device: torch.device) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise DeviceFailedError(f"the model cannot be put on {device}: {first_line(error)}") from error


def _own_pass(model: nn.Module, modelling: str, is_on_device: bool, num_shared: int) -> tuple[OwnPass | None, str]:
    """Make what computes the forward pass in the place of the modelling classes; where nothing can, say why.

    Raises UnsupportedModelError where only this could leave shared experts to workers.
    """
    if modelling == "transformers":
        why = "asked for"
    else:
        why = programs.why_not(model, is_on_device=True) if is_on_device else lean.why_not(model)
    if num_shared and (why or is_on_device):
        raise UnsupportedModelError(
            f"shared experts cannot be left to workers: {why or 'attention is on a device'}; leave them on the router "
            "(--shared-experts=router)"
        )
    if why:
        return None, why
    return DeviceModel(model) if is_on_device else LeanModel(model, num_shared), ""


def _moe_layers(model: nn.Module) -> tuple[int, ...]:
    """The decoder layer of each MoE layer."""
    found = [
        (m.layer, int(re.findall(r"\d+", name)[0])) for name, m in model.named_modules() if isinstance(m, RemoteExperts)
    ]
    return tuple(decoder_layer for _, decoder_layer in sorted(found))


def _eos_ids(model: Any, generation: Mapping[str, object]) -> tuple[int, ...]:
    """The ids of generation_config.json, checked; without any, those of config.json."""
    eos: Any = generation.get("eos_token_id")
    if eos is None:
        eos = model.config.eos_token_id
    return _ids_of(eos, int(model.config.vocab_size))


def _id_of(fields: Mapping[str, object], name: str, path: Path, vocab_size: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise CheckpointError(f"{path}: {name} is {value!r:.40}; it must be a token id below {vocab_size}")
    return value


def _ids_of(said: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids of a field that holds one, several or none."""
    ids = said if isinstance(said, list | tuple) else [] if said is None else [said]
    return tuple(sorted({int(i) for i in ids if 0 <= int(i) < vocab_size}))
