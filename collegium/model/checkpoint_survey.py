"""What a checkpoint holds by its config.json and the headers of its files, checked before a byte of a tensor is read.

Owns the recognition of expert tensors and the check that every expert is whole and fits the config. Takes time in
proportion to the headers alone, so that every service can ask before it starts anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from collegium.model.architectures import (
    Architecture,
    ExpertForm,
    Layout,
    Role,
    UnsupportedModelError,
    config_int,
    expert_form,
    read_architecture,
    role_of,
)
from collegium.model.checkpoint_files import CheckpointError, shown
from collegium.model.config_fields import check_generation_config
from collegium.model.encoder_decoder import EncoderDecoderConfig, read_encoder_decoder
from collegium.model.manifest_entries import ITEM_BYTES, TensorRef
from collegium.model.router_tensors import RouterTensor, check_encoder_decoder, check_router_tensors, layer_of
from collegium.model.safetensors_files import StoredTensor, list_weight_files, read_headers

MAX_EXPERTS = 250_000  # of all layers; the largest published models have 24,000


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A checkpoint whose headers fit its config: where everything lies, and nothing of what the bytes are."""

    model_type: str
    form: ExpertForm
    layout: Layout
    num_experts: int
    top_k: int
    d_model: int
    d_ffn: int
    files: Mapping[str, tuple[int, int]]  # name -> (bytes, mtime in ns)
    experts: Mapping[int, Mapping[int, Mapping[Role, TensorRef]]]  # by decoder layer, expert and role
    router: tuple[RouterTensor, ...]  # what routers read

    def shares(self) -> Iterator[TensorRef]:
        """Iterate over the tensors of all experts."""
        for layer in self.experts.values():
            for expert in layer.values():
                yield from expert.values()


@dataclass(slots=True)
class _Found:
    """What the headers hold: the experts' shares by decoder layer, expert and role, and everything else."""

    experts: dict[int, dict[int, dict[Role, TensorRef]]] = field(
        default_factory=dict[int, dict[int, dict[Role, TensorRef]]]
    )
    layouts: dict[Layout, str] = field(default_factory=dict[Layout, str])  # with a tensor that shows it
    router: list[RouterTensor] = field(default_factory=list[RouterTensor])


def survey_checkpoint(model_dir: Path) -> Survey:
    """Read config.json, generation_config.json and the headers of a checkpoint, and check that they fit each other.

    Raises UnsupportedModelError, or CheckpointError naming the file and the field or tensor that is wrong.
    """
    config, architecture = read_architecture(model_dir)
    path = model_dir / "config.json"
    form = expert_form(config, path)
    check_generation_config(model_dir)
    files = list_weight_files(model_dir)
    both = read_encoder_decoder(config, path) if architecture.is_encoder_decoder else None
    if both is None:
        num_experts = _required(path, config, architecture.num_experts_key)
        top_k = _required(path, config, architecture.top_k_key)
        num_layers = _required(path, config, architecture.num_layers_key)
    else:
        num_experts, top_k, num_layers = both.num_experts, both.top_k, both.num_layers
    found = _find_tensors(model_dir, files, architecture, num_experts, both)
    for layer in [x for x in found.experts if x >= num_layers]:
        del found.experts[layer]  # further ones predict more than one token and are not served
    if not found.experts:
        raise CheckpointError(f"{model_dir} holds no expert tensors of a {architecture.model_type} checkpoint")
    layout = _one_layout(model_dir, found)
    d_model, d_ffn = _check_complete(model_dir, architecture, layout, found.experts, num_experts)
    if both is None:
        router = tuple(one for one in found.router if layer_of(one.key) < num_layers)
        check_router_tensors(model_dir, config, architecture, router, d_model=d_model, num_experts=num_experts)
    else:
        router = check_encoder_decoder(model_dir, both, found.router)
        _check_stacks(path, both, found.experts)
    return Survey(
        model_type=architecture.model_type,
        form=form,
        layout=layout,
        num_experts=num_experts,
        top_k=top_k,
        d_model=d_model,
        d_ffn=d_ffn,
        files=files,
        experts=found.experts,
        router=router,
    )


def _required(path: Path, config: Mapping[str, object], key: str) -> int:
    value = config_int(config, key)
    if value is None:
        raise CheckpointError(f"{path} lacks {key}")
    return value


def _check_stacks(
    path: Path, config: EncoderDecoderConfig, experts: Mapping[int, Mapping[int, Mapping[Role, TensorRef]]]
) -> None:
    """Check that those layers have experts in the files that have them by the config, as wide as it says."""
    if sorted(experts) != list(config.moe_layers):
        raise CheckpointError(
            f"{path}: by its fields layers {list(config.moe_layers)} have experts, counted through both stacks; "
            f"the files hold experts of layers {sorted(experts)}"
        )
    for layer, each in experts.items():
        stack = config.encoder if layer < config.encoder.num_layers else config.decoder
        for ref in (roles[Role.UP] for roles in each.values()):
            if ref.shape != (stack.d_ffn, config.d_model):
                _refuse_shape(path.parent, ref, f"{[stack.d_ffn, config.d_model]}")


def _find_tensors(
    model_dir: Path,
    files: Mapping[str, object],
    architecture: Architecture,
    num_experts: int,
    both: EncoderDecoderConfig | None,
) -> _Found:
    """Sort every tensor of the files into experts' shares and the router's."""
    found = _Found()
    num_shares = 0
    for name, header, start in read_headers(model_dir, files):
        for key, tensor in header.items():
            role = role_of(architecture, key, 0 if both is None else both.encoder.num_layers)
            if role is None:
                found.router.append(RouterTensor(name, key, tensor.dtype, tensor.shape, start + tensor.offsets[0]))
                continue
            layout, what, layer, _ = role
            found.layouts.setdefault(layout, key)
            for expert, ref in _split(model_dir / name, key, tensor, start, role, num_experts):
                roles = found.experts.setdefault(layer, {}).setdefault(expert, {})
                if what in roles:
                    raise CheckpointError(
                        f"{model_dir / name}: tensors {shown(roles[what].key)} and {shown(key)} both are the {what} of "
                        f"expert {expert} of decoder layer {layer}"
                    )
                roles[what] = ref
                num_shares += 1
                if num_shares > 4 * MAX_EXPERTS:
                    raise CheckpointError(f"{model_dir} has more than {MAX_EXPERTS} experts; that is not supported")
    return found


def _split(
    path: Path, key: str, tensor: StoredTensor, start: int, role: tuple[Layout, Role, int, int | None], num_experts: int
) -> list[tuple[int, TensorRef]]:
    """Cut a stored tensor into the shares of its experts: (expert, share)."""
    layout, what, _, expert = role
    dtype, shape, begin = tensor.dtype, tensor.shape, start + tensor.offsets[0]
    if dtype not in ITEM_BYTES:
        raise UnsupportedModelError(
            f"{path}: tensor {shown(key)} is of type {dtype}; float32, bfloat16 and float16 are served"
        )
    if 0 in shape:
        raise CheckpointError(f"{path}: tensor {shown(key)} has shape {list(shape)}, which is empty")
    if expert is not None:
        shares = [(expert, shape, begin)]
    else:
        is_stacked = layout == Layout.STACKED
        if not shape or shape[0] % num_experts or (not is_stacked and shape[0] != num_experts):
            raise CheckpointError(
                f"{path}: tensor {shown(key)} has shape {list(shape)}, which does not hold {num_experts} experts"
            )
        share = (shape[0] // num_experts, *shape[1:]) if is_stacked else shape[1:]
        stride = (tensor.offsets[1] - tensor.offsets[0]) // num_experts
        shares = [(e, share, begin + e * stride) for e in range(num_experts)]
    return [
        (e, TensorRef(file=path.name, key=key, role=what, offset=at, shape=share, dtype=dtype))
        for e, share, at in shares
    ]


def _one_layout(model_dir: Path, found: _Found) -> Layout:
    if len(found.layouts) > 1:
        keys = " and ".join(shown(key) for key in found.layouts.values())
        raise UnsupportedModelError(f"{model_dir} holds experts in two layouts, tensors {keys}; save it in one")
    return next(iter(found.layouts))


def _check_complete(
    model_dir: Path,
    architecture: Architecture,
    layout: Layout,
    found: Mapping[int, Mapping[int, Mapping[Role, TensorRef]]],
    num_experts: int,
) -> tuple[int, int]:
    """Check that every expert of every layer is whole and of one shape; return (d_model, d_ffn)."""
    needed = set(architecture.layouts[layout].values())
    sizes: set[tuple[int, int]] = set()
    for layer, experts in sorted(found.items()):
        for expert in range(num_experts):
            lacks = needed - set(experts.get(expert, {}))
            if lacks:
                raise CheckpointError(
                    f"{model_dir}: expert {expert} of decoder layer {layer} "
                    f"lacks its {', '.join(sorted(lacks))} tensor; fetch the checkpoint again"
                )
            sizes.add(_sizes_of(model_dir, layout, experts[expert]))
        if extra := sorted(set(experts) - set(range(num_experts))):
            raise CheckpointError(
                f"{model_dir}: decoder layer {layer} has expert {extra[0]}, config.json names {num_experts}"
            )
    if layout == Layout.UNGATED and len({d_model for d_model, _ in sizes}) == 1:
        return max(sizes)  # an encoder's experts may be of another width than a decoder's
    if len(sizes) != 1:
        raise CheckpointError(f"{model_dir}: experts differ in shape: (model, ffn) is one of {sorted(sizes)[:8]}")
    return sizes.pop()


def _sizes_of(model_dir: Path, layout: Layout, tensors: Mapping[Role, TensorRef]) -> tuple[int, int]:
    down = tensors[Role.DOWN].shape
    if len(down) != 2:
        _refuse_shape(model_dir, tensors[Role.DOWN], "two dimensions")
    is_plain = layout in (Layout.PER_EXPERT, Layout.FUSED, Layout.UNGATED)
    d_model, d_ffn = (down[0], down[1]) if is_plain else (down[1], down[0])
    wanted = {
        Role.GATE: (d_ffn, d_model),
        Role.UP: (d_ffn, d_model),
        Role.GATE_UP: (d_model, 2 * d_ffn) if layout == Layout.FUSED_TRANSPOSED else (2 * d_ffn, d_model),
        Role.GATE_UP_BIAS: (2 * d_ffn,),
        Role.UP_BIAS: (d_ffn,),
        Role.DOWN_BIAS: (d_model,),
        Role.DOWN: down,
    }
    for role, ref in tensors.items():
        if ref.shape != wanted[role]:
            _refuse_shape(model_dir, ref, f"{list(wanted[role])}")
    return d_model, d_ffn


def _refuse_shape(model_dir: Path, ref: TensorRef, wanted: str) -> None:
    raise CheckpointError(
        f"{model_dir / ref.file}: tensor {shown(ref.key)} has shape {list(ref.shape)}, expected {wanted}"
    )
