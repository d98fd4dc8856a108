"""Load a checkpoint's attention and gates through transformers, with nothing in the place of the experts.

Owns all contact with transformers' internals (pinned to 5.23; TRANSFORMERS.md of the design notes says what was tried).
Expert tensors are never read: the stand-in (remote_experts.py) has no parameters, so their keys are left on the disk.
"""

import contextlib
import re
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from collegium.fabric import logs
from collegium.model.allocation import first_line, is_out_of_memory
from collegium.model.architectures import UnsupportedModelError, read_config
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.checkpoint_survey import survey_checkpoint
from collegium.model.config_fields import check_generation_config, model_fields
from collegium.model.kernels import pack_linears
from router_svc import family, lean, shared_experts
from router_svc.cache_shapes import CacheShape
from router_svc.device_model import DeviceModel
from router_svc.lean import LeanModel
from router_svc.lengths import served_positions
from router_svc.paged_attention import ATTENTION_NAME, ProbeCache, attend_packed
from router_svc.remote_experts import RemoteExperts
from router_svc.router_model import OwnPass, RouterModel

_log = logs.get("model")

# Every experts class of the supported architectures, and no stand-in.
_EXPERTS_CLASS = r"^(?!Remote)\w+Experts$"


class DeviceFailedError(RuntimeError):
    """The device refused the model's tensors; neither the checkpoint nor a lack of memory is at fault."""


def load_router_model(
    model_dir: Path, dtype: torch.dtype, device: torch.device, modelling: str = "auto"
) -> RouterModel:
    """Load a checkpoint without experts and learn its cache's shapes. Process-global while it runs: one load at a time.

    `modelling` "transformers": compute with the modelling classes even where it could be done leanly; "device": as on a
    GPU, whatever the device is, which is for tests.
    Raises UnsupportedModelError, or CheckpointError naming the file and the first field or tensor that is wrong, or the
    part that transformers could not do; DeviceFailedError; whatever torch raises if memory cannot be had.
    """
    survey = survey_checkpoint(model_dir)  # before transformers reads what it does not bound
    generation = check_generation_config(model_dir)
    path = model_dir / "config.json"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _told_as(f"{path} is not usable"):
        config = config_of(read_config(model_dir))
    AttentionInterface.register(ATTENTION_NAME, attend_packed)
    what = f"attention, gates and embeddings of {model_dir} cannot be loaded as its config.json says"
    with _told_as(what), _without_experts(config):
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            generation_config=transformers.GenerationConfig(),  # its file was read above, within bounds
            attn_implementation="eager",
            experts_implementation="eager",
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{model_dir} lacks tensor {missing[0]} ({len(missing)} missing); fetch the checkpoint again"
        )
    with _told_as(f"transformers cannot compute a token with {path}"):
        moe_layers = _number_layers(model)
        _wrap_shared(model)
        model.set_attn_implementation(ATTENTION_NAME)
        model.eval().requires_grad_(False)
        _move(model, device)
        leanly, why = _own_pass(model, modelling)
        if device.type == "cpu":
            pack_linears(model)
        cache_shapes = leanly.cache_shapes if leanly else _probe(model, device)
    _log.info("forward pass", by="collegium" if leanly else "transformers", why=why or "its layers are of the family")
    vocab_size = int(config.get_text_config().vocab_size)
    return RouterModel(
        model=model,
        model_type=survey.model_type,
        dtype=dtype,
        device=device,
        vocab_size=vocab_size,
        max_positions=served_positions(config.get_text_config()),
        num_experts=survey.num_experts,
        top_k=survey.top_k,
        eos_ids=tuple(i for i in _eos_ids(model, generation) if 0 <= i < vocab_size),
        cache_shapes=cache_shapes,
        moe_layers=moe_layers,
        lean=leanly,
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


@contextlib.contextmanager
def _without_experts(config: PreTrainedConfig) -> Generator[None]:
    """Have RemoteExperts built where a model has its experts. transformers does not undo its patches after an error."""
    AutoModelForCausalLM._model_mapping[type(config)]  # imports the modelling classes, which are then patched
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    originals = [
        (module, name, value)
        for module in modules
        for name, value in list(vars(module).items())
        if isinstance(value, type) and re.match(_EXPERTS_CLASS, name)
    ]
    register_patch_mapping({_EXPERTS_CLASS: RemoteExperts})
    try:
        yield
    finally:
        unregister_patch_mapping([_EXPERTS_CLASS])
        for module, name, original in originals:
            setattr(module, name, original)


def _move(model: PreTrainedModel, device: torch.device) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise DeviceFailedError(f"the model cannot be put on {device}: {first_line(error)}") from error


def _own_pass(model: PreTrainedModel, modelling: str) -> tuple[OwnPass | None, str]:
    """Make what computes the forward pass in the place of the modelling classes; where nothing can, say why."""
    if modelling == "transformers":
        return None, "asked for"
    is_on_device = modelling == "device" or model.device.type != "cpu"
    if why := family.why_not(model) if is_on_device else lean.why_not(model):
        return None, why
    return DeviceModel(model) if is_on_device else LeanModel(model), ""


def config_of(fields: Mapping[str, object]) -> PreTrainedConfig:
    """Make transformers' config of a checked config.json, of the fields that matter alone."""
    return CONFIG_MAPPING[str(fields["model_type"])].from_dict(model_fields(fields))


def _number_layers(model: PreTrainedModel) -> tuple[int, ...]:
    found = [(int(re.findall(r"\d+", name)[0]), m) for name, m in model.named_modules() if isinstance(m, RemoteExperts)]
    if not found:
        raise UnsupportedModelError("the model has no MoE layer: there is nothing for expert workers to compute")
    found.sort(key=lambda pair: pair[0])
    for idx, (_, module) in enumerate(found):
        module.layer = idx
    return tuple(layer for layer, _ in found)


def _wrap_shared(model: PreTrainedModel) -> None:
    for block in list(model.modules()):
        for remote in [child for child in block.children() if isinstance(child, RemoteExperts)]:
            if (shared := shared_experts.wrap(block)) is not None:
                remote.shared.append(shared)


def _eos_ids(model: PreTrainedModel, generation: Mapping[str, object]) -> tuple[int, ...]:
    """The ids of generation_config.json, checked; without any, those of config.json."""
    eos: Any = generation.get("eos_token_id")
    if eos is None:
        eos = model.config.eos_token_id
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    return tuple(sorted({int(i) for i in ids}))


@torch.inference_mode()
def _probe(model: PreTrainedModel, device: torch.device) -> dict[int, CacheShape]:
    for module in model.modules():
        if isinstance(module, RemoteExperts):
            module.call = lambda _layer, x, _ids, _weights: torch.zeros_like(x)
    probe = ProbeCache()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=zero, position_ids=zero, past_key_values=probe, use_cache=True, paged=probe, logits_to_keep=1)
    if not probe.shapes:
        raise UnsupportedModelError("the model keeps no key-value cache that can be paged")
    return probe.shapes
