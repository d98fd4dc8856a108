"""Load what a router's settings name, and say of every failure what failed, in which part, of which checkpoint.

Owns the order: the device, the manifest, the model. A message names a flag only if another value of it would help.
"""

import torch

from collegium.fabric import logs
from collegium.fabric.errors import FailedPrecondition
from collegium.model.allocation import first_line, is_out_of_memory
from collegium.model.architectures import UnsupportedModelError
from collegium.model.calibration import settle_kernel
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.devices import DeviceError, find_device
from collegium.model.kernels import KernelUnavailableError
from collegium.model.manifest import Manifest, ManifestPathError, check_folder, ensure_manifest, load_manifest
from collegium.model.served_dtype import tell_dtype
from router_svc.model_loader import DeviceFailedError, load_router_model
from router_svc.router_model import RouterModel
from router_svc.settings import Settings

_log = logs.get("router")


def load(config: Settings) -> tuple[RouterModel, Manifest]:
    """Load what the settings name. Raises FailedPrecondition with what failed, in which part, and what to do."""
    device = choose_device(config.device)
    manifest = find_manifest(config)
    dtype = getattr(torch, manifest.dtype if config.dtype == "auto" else config.dtype)
    if config.dtype == "auto" and (told := tell_dtype(manifest.stored_dtypes, manifest.dtype)):
        _log.warning(told, model=str(config.model))
    torch.set_num_threads(config.threads or torch.get_num_threads())  # a thread's own setting: this one measures
    try:
        settle_kernel(config.kernel, manifest.d_model, manifest.d_ffn, dtype, manifest.form)
        model = load_router_model(config.model, dtype, device, config.modelling, manifest.num_shared)
        _check_agreement(manifest, model)
    except (CheckpointError, UnsupportedModelError) as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_CHECKPOINT", field="--model") from error
    except KernelUnavailableError as error:
        raise FailedPrecondition(
            str(error), reason="KERNEL_UNAVAILABLE", field="--kernel", remedy="use --kernel=auto"
        ) from error
    except DeviceFailedError as error:
        raise FailedPrecondition(
            str(error), reason="UNUSABLE_DEVICE", field="--device", remedy="use cpu or cuda:N"
        ) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise FailedPrecondition(
            f"there is not enough memory on {device} for attention, gates and embeddings of {config.model} in "
            f"{str(dtype).removeprefix('torch.')} ({first_line(error)})",
            reason="OUT_OF_MEMORY",
            field="--model",
            remedy="free memory, or use --dtype=bfloat16" if dtype == torch.float32 else "free memory",
        ) from error
    return model, manifest


def choose_device(name: str) -> torch.device:
    """Find the device of attention. Raises FailedPrecondition where it cannot be used."""
    try:
        device = find_device(name)
        if device.type == "meta":
            raise DeviceError("the meta device computes nothing")
    except DeviceError as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_DEVICE", field="--device", remedy=error.remedy) from error
    return device


def find_manifest(config: Settings) -> Manifest:
    """Read the manifest that the settings name, or the cached one. Raises FailedPrecondition if it cannot be used."""
    try:
        manifest = load_manifest(config.manifest or ensure_manifest(config.model))
    except (CheckpointError, UnsupportedModelError) as error:
        field = "--manifest" if config.manifest else "--model"
        raise FailedPrecondition(str(error), reason="UNUSABLE_CHECKPOINT", field=field) from error
    except ManifestPathError as error:
        raise FailedPrecondition(str(error), reason="MANIFEST_PATH", field="XDG_CACHE_HOME") from error
    try:
        check_folder(manifest, config.model)
    except (CheckpointError, UnsupportedModelError) as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_CHECKPOINT", field="--model") from error
    return manifest


def _check_agreement(manifest: Manifest, model: RouterModel) -> None:
    of_manifest = (manifest.model_type, manifest.top_k, tuple(x.decoder_layer for x in manifest.layers))
    of_model = (model.model_type, model.top_k, model.moe_layers)
    num_experts = {len(layer.experts) for layer in manifest.layers}
    if of_manifest != of_model or num_experts != {model.num_experts}:
        raise CheckpointError(
            f"the manifest is of another checkpoint: it has (type, top-k, MoE layers) {of_manifest} and {num_experts} "
            f"experts, the model {of_model} and {model.num_experts}; run `collegium manifest` on the model's folder"
        )
