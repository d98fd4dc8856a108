"""Load a checkpoint's attention and gates through transformers, with nothing in the place of the experts.

Owns all contact with transformers' internals (pinned to 5.23; TRANSFORMERS.md of the design notes says what was tried).
Expert tensors are never read: the stand-in has no parameters, so their keys are left on the disk. Imported where a
model is not of the commonest family alone: the import takes two seconds of a core.
"""

import contextlib
import re
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from collegium.model.architectures import UnsupportedModelError
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.config_fields import model_fields
from router_svc import shared_experts
from router_svc.cache_shapes import CacheShape
from router_svc.paged_attention import ATTENTION_NAME, ProbeCache, attend_packed
from router_svc.remote_experts import RemoteExperts

# Every experts class of the supported architectures, and no stand-in.
_EXPERTS_CLASS = r"^(?!Remote)\w+Experts$"


def config_of(fields: Mapping[str, object]) -> PreTrainedConfig:
    """Make transformers' config of a checked config.json, of the fields that matter alone."""
    return CONFIG_MAPPING[str(fields["model_type"])].from_dict(model_fields(fields))


def load_library_model(model_dir: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build and fill a model without experts. Process-global while it runs: one load at a time.

    Raises CheckpointError for a tensor that is missing, and whatever transformers raises.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    AttentionInterface.register(ATTENTION_NAME, attend_packed)
    with _without_experts(config):
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            generation_config=transformers.GenerationConfig(),  # its file is read by whoever calls, within bounds
            attn_implementation="eager",
            experts_implementation="eager",
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{model_dir} lacks tensor {missing[0]} ({len(missing)} missing); fetch the checkpoint again"
        )
    return model


def prepare(model: PreTrainedModel) -> None:
    """Have a model's attention and its shared experts call us."""
    for block in list(model.modules()):
        for remote in [child for child in block.children() if isinstance(child, RemoteExperts)]:
            if (shared := shared_experts.wrap(block)) is not None:
                remote.shared.append(shared)
    model.set_attn_implementation(ATTENTION_NAME)


def number_layers(model: nn.Module) -> None:
    """Tell every stand-in which MoE layer it is. Raises UnsupportedModelError if there is none."""
    found = [(int(re.findall(r"\d+", name)[0]), m) for name, m in model.named_modules() if isinstance(m, RemoteExperts)]
    if not found:
        raise UnsupportedModelError("the model has no MoE layer: there is nothing for expert workers to compute")
    found.sort(key=lambda pair: pair[0])
    for idx, (_, module) in enumerate(found):
        module.layer = idx


@torch.inference_mode()
def probe_cache(model: PreTrainedModel, device: torch.device) -> dict[int, CacheShape]:
    """Learn the shapes of a model's cache from a pass of one token. Raises UnsupportedModelError."""
    for module in model.modules():
        if isinstance(module, RemoteExperts):
            module.call = lambda _layer, x, _ids, _weights: torch.zeros_like(x)
    probe = ProbeCache()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=zero, position_ids=zero, past_key_values=probe, use_cache=True, paged=probe, logits_to_keep=1)
    if not probe.shapes:
        raise UnsupportedModelError("the model keeps no key-value cache that can be paged")
    return probe.shapes


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
