"""The two stacks of a translation model: sources through the encoder at once, targets a token at a time.

Owns EncoderDecoderModel: the weights of both stacks but for their experts, read from the checkpoint as they lie, and
the passes over them. Not by the modelling classes of transformers: its 5.23 runs two experts of each layer of NLLB-MoE,
whatever their gate says.
A source's rows see all of it, so it is encoded whole; what the decoder's layers need of it, keys and values, is kept in
blocks of the same pools as the target's own. Decoder rows all go the way of decode rows, one block table each.
S rows of sources, T decoder rows, D model, H heads, W head width, E experts, K top-k, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from collegium.model.architectures import ExpertForm, expert_form
from collegium.model.encoder_decoder import NLLB, EncoderDecoderConfig, StackConfig
from collegium.model.kernels import Kernel, PackedLinear
from collegium.model.native.layer import (
    AttentionWeights,
    CrossAttentionWeights,
    FinalNorm,
    GateWeights,
    LayerBlock,
    LayerWeights,
    MlpWeights,
    NormWeights,
    Workspace,
)
from collegium.model.native.step import DecodeStep, StepWeights
from collegium.model.router_tensors import RouterTensor
from router_svc.cache_shapes import CacheShape
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.paged_attention import PagedCache, SourceRun
from router_svc.remote_experts import RemoteExperts, StepCall

_MOST_STEPS = 32
_FARTHEST = 1 << 16  # distances that a table holds; there is one bucket long before


class MoeBlock(nn.Module):
    """A layer's gate, to be asked ahead, beside what stands for its experts."""

    def __init__(self, gate: GateWeights, layer: int, dtype: torch.dtype):
        super().__init__()
        self.gate = nn.Linear(1, 1, bias=False)
        self.gate.weight = nn.Parameter(gate.weight.to(dtype), requires_grad=False)
        self.gate.bias = None if gate.bias is None else nn.Parameter(gate.bias.to(dtype), requires_grad=False)
        self.experts = RemoteExperts()
        self.experts.layer = layer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    block: LayerBlock
    experts: RemoteExperts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """by_distance: of Switch, the encoder's [H, 2 * farthest + 1], from as far behind to as far ahead."""

    layers: list[_Layer]
    final_norm: FinalNorm
    embedding: Tensor  # [V, D]
    by_distance: Tensor | None = None


class EncoderDecoderModel(nn.Module):
    """Encodes sources and computes decoder steps. Its submodules are those that others ask for: gates and stand-ins."""

    def __init__(
        self,
        model_dir: Path,
        config: EncoderDecoderConfig,
        fields: Mapping[str, object],
        tensors: Sequence[RouterTensor],
        dtype: torch.dtype,
    ):
        """Read `tensors`, all that the config expects, and pack them. Raises what safetensors and torch raise."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.blocks = nn.ModuleList()
        with _Reader(model_dir, tensors, dtype) as read:
            form = expert_form(fields)
            make = _nllb_layer if config.model_type == NLLB else _switch_layer
            prefix = "model." if config.model_type == NLLB else ""
            shared = read(f"{prefix}shared.weight") if config.is_tied else None
            self._encoder, self._decoder = (
                self._stack(read, f"{prefix}{name}", stack, shared, make, form, is_decoder=name == "decoder")
                for name, stack in (("encoder", config.encoder), ("decoder", config.decoder))
            )
            head = self._decoder.embedding if shared is not None else read("lm_head.weight")
        self.lm_head = PackedLinear(head, kernel=Kernel.NATIVE)
        # Of a tied head Switch scales the rows before it, as T5 does (Raffel et al., 2020).
        self._head_divisor = math.sqrt(config.d_model) if config.model_type != NLLB and config.is_tied else 1.0
        width = config.decoder.num_heads, config.head_width
        self.cache_shapes = {layer: CacheShape(key=width, value=width) for layer in range(config.decoder.num_layers)}
        self._positions = _sinusoids(config) if config.model_type == NLLB else None
        self._step_weights = StepWeights(
            embedding=self._decoder.embedding,
            embedding_scale=config.embedding_scale,
            final_norm=self._decoder.final_norm,
            rotated=0,
            positions=self._positions,
            first_layer=len(config.encoder.sparse),
        )
        self._steps: dict[int, DecodeStep] = {}
        self._bound: PagedCache | None = None
        self.compute_step: StepCall | None = None

    def set_step_call(self, call: StepCall | None) -> None:
        """Say who computes all layers of a decode step in one call; None: nobody."""
        self.compute_step = call

    # --- sources ---

    def encode(self, sources: Sequence[SourceRun], cache: PagedCache, most_rows: int) -> None:
        """Encode sources whole and store what the decoder's layers look at of them.

        most_rows: of one call for experts, which are asked in as many as it takes.
        """
        num_threads = torch.get_num_threads()
        ids = torch.tensor([token for one in sources for token in one.token_ids])
        at = torch.tensor([place for one in sources for place in range(len(one.token_ids))])
        lengths = np.array([len(one.token_ids) for one in sources], np.int64)
        work = Workspace([layer.block for layer in self._encoder.layers], len(ids))
        work.h.copy_(self._embed(self._encoder.embedding, ids, at))
        width = self.config.encoder.num_heads * self.config.head_width
        keys, values = torch.empty(2, len(ids), width, dtype=self.dtype)
        slots, no_rotation = torch.arange(len(ids)), torch.empty(0)
        for layer in self._encoder.layers:
            block = layer.block
            block.bind(keys, values)
            block.project(work, no_rotation, no_rotation, slots, num_threads)
            block.attend_around(work, lengths, self._encoder.by_distance, num_threads)
            self._finish(layer, work, most_rows, num_threads)
        encoded = self._encoder.final_norm.apply(work.h).to(self.dtype)
        slots = torch.tensor([slot for one in sources for slot in one.slots])
        for idx, layer in enumerate(self._decoder.layers):
            for pool, rows in zip(cache.pools(idx), layer.block.keys_and_values(encoded), strict=True):
                pool.index_copy_(0, slots, rows)

    def _finish(self, layer: _Layer, work: Workspace, most_rows: int, num_threads: int) -> None:
        """Add a layer's attention, and its experts or its dense part."""
        ids, weights = layer.block.finish(work, num_threads)
        if layer.experts is None:
            layer.block.add_mlp(work, num_threads)
            return
        call, number = layer.experts.call, layer.experts.layer
        assert call is not None
        parts = zip(*(one.split(most_rows) for one in (work.x, ids, weights)), strict=True)
        sums = [call(number, x, some_ids, some_weights) for x, some_ids, some_weights in parts]
        layer.block.add(work, sums[0] if len(sums) == 1 else torch.cat(sums))

    # --- targets ---

    def forward(self, input_ids: Tensor, positions: Tensor, cache: PagedCache, keep: Tensor) -> Tensor:
        """Compute one packed pass of decoder rows: input_ids, positions [1, T]; returns logits [len(keep), V]."""
        if self._bound is not cache:
            for idx, layer in enumerate(self._decoder.layers):
                layer.block.bind(*cache.pools(idx))
            self._bound = cache
        index, num_threads, num_rows = cache.index, torch.get_num_threads(), input_ids.shape[1]
        tables, sources = index.row_tables, index.source_tables
        places = self._places(input_ids[0], positions[0])
        if self.compute_step is not None and not index.chunks:
            while len(self._steps) > _MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            blocks = [layer.block for layer in self._decoder.layers]
            step = self._steps.pop(num_rows, None) or DecodeStep(blocks, self._step_weights, num_rows)
            none = torch.empty(0)
            step.begin(input_ids, places, (none, none), index.slots, tables, num_threads, sources)
            try:
                if self.compute_step(step):
                    return self._logits(step.work.x if len(keep) == num_rows else step.work.x.index_select(0, keep))
                first, work = step.block, step.work
                if first:
                    return self._by_layer(first, work, cache, keep, num_threads)
            finally:
                self._steps[num_rows] = step
        work = Workspace([layer.block for layer in self._decoder.layers], num_rows)
        work.h.copy_(self._embed(self._decoder.embedding, input_ids[0], positions[0]))
        return self._by_layer(0, work, cache, keep, num_threads)

    def _by_layer(self, first: int, work: Workspace, cache: PagedCache, keep: Tensor, num_threads: int) -> Tensor:
        index, no_rotation = cache.index, torch.empty(0)
        for layer in self._decoder.layers[first:]:
            layer.block.project(work, no_rotation, no_rotation, index.slots, num_threads)
            layer.block.attend(work, index.row_tables, num_threads)
            layer.block.attend_source(work, index.source_tables, num_threads)
            self._finish(layer, work, work.h.shape[0], num_threads)
        return self._logits(self._decoder.final_norm.apply(work.h.index_select(0, keep)).to(self.dtype))

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(rows)
        return logits if self._head_divisor == 1.0 else logits / self._head_divisor

    # --- both ---

    def _embed(self, table: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        rows = table.index_select(0, ids).float()
        if self.config.embedding_scale != 1.0:
            rows *= self.config.embedding_scale
        if self._positions is not None:
            rows += self._positions.index_select(0, self._places(ids, positions))
        return rows

    def _places(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Rows of the table of positions; that of padding, the last one, is zeros."""
        if self._positions is None:
            return positions
        return torch.where(ids == self.config.pad_id, len(self._positions) - 1, positions)

    def _stack(
        self,
        read: "_Reader",
        prefix: str,
        stack: StackConfig,
        shared: Tensor | None,
        make: "_MakeLayer",
        form: ExpertForm,
        *,
        is_decoder: bool,
    ) -> _Stack:
        config = self.config
        by_distance: Tensor | None = None
        if config.num_buckets:
            table = read(f"{prefix}.block.0.layer.0.SelfAttention.relative_attention_bias.weight").float()
            by_distance = _by_distance(config, table, is_decoder=is_decoder)
        layers: list[_Layer] = []
        for idx in range(stack.num_layers):
            weights = make(
                read, config, prefix, idx, is_decoder, idx in stack.sparse, form, by_distance if is_decoder else None
            )
            experts: RemoteExperts | None = None
            if weights.gate is not None:
                self.blocks.append(block := MoeBlock(weights.gate, len(self.blocks), self.dtype))
                experts = block.experts
            layers.append(_Layer(block=LayerBlock(weights, BLOCK_TOKENS), experts=experts))
        norm = _norm(read, f"{prefix}.{'layer_norm' if config.model_type == NLLB else 'final_layer_norm'}", config)
        return _Stack(
            layers=layers,
            final_norm=FinalNorm(norm),
            embedding=(read(f"{prefix}.embed_tokens.weight") if shared is None else shared).contiguous(),
            by_distance=None if is_decoder else by_distance,
        )


_MakeLayer = Callable[
    ["_Reader", EncoderDecoderConfig, str, int, bool, bool, ExpertForm, Tensor | None],
    LayerWeights,
]


class _Reader:
    """Reads tensors by name, in the model's type; a context manager that keeps their files open."""

    def __init__(self, model_dir: Path, tensors: Sequence[RouterTensor], dtype: torch.dtype):
        self._file_of = {one.key: one.file for one in tensors}
        self._model_dir, self._dtype = model_dir, dtype
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def __call__(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        name = self._file_of[key]
        if name not in self._files:
            self._files[name] = safe_open(self._model_dir / name, framework="pt")
        tensor: Tensor = self._files[name].get_tensor(key)
        return tensor.to(dtype or self._dtype)


def _nllb_layer(
    read: _Reader,
    config: EncoderDecoderConfig,
    prefix: str,
    idx: int,
    is_decoder: bool,
    is_sparse: bool,
    form: ExpertForm,
    by_distance: Tensor | None,
) -> LayerWeights:
    at = f"{prefix}.layers.{idx}"

    def joined(attention: str, names: str, kind: str) -> Tensor:
        return torch.cat([read(f"{at}.{attention}.{name}_proj.{kind}") for name in names])

    cross: CrossAttentionWeights | None = None
    if is_decoder:
        cross = CrossAttentionWeights(
            norm=_norm(read, f"{at}.cross_attention_layer_norm", config),
            query=joined("cross_attention", "q", "weight"),
            query_bias=joined("cross_attention", "q", "bias"),
            key_value=joined("cross_attention", "kv", "weight"),
            key_value_bias=joined("cross_attention", "kv", "bias"),
            out=read(f"{at}.cross_attention.out_proj.weight"),
            out_bias=read(f"{at}.cross_attention.out_proj.bias"),
        )
    mlp: MlpWeights | None = None
    if not is_sparse:
        mlp = MlpWeights(
            gate=None,
            up=read(f"{at}.ffn.fc1.weight"),
            down=read(f"{at}.ffn.fc2.weight"),
            biases=(read(f"{at}.ffn.fc1.bias"), read(f"{at}.ffn.fc2.bias")),
            form=form,
        )
    return LayerWeights(
        input_norm=_norm(read, f"{at}.self_attn_layer_norm", config),
        output_norm=_norm(read, f"{at}.ff_layer_norm", config),
        attention=AttentionWeights(
            qkv=joined("self_attn", "qkv", "weight"),
            qkv_bias=joined("self_attn", "qkv", "bias"),
            out=read(f"{at}.self_attn.out_proj.weight"),
            out_bias=read(f"{at}.self_attn.out_proj.bias"),
            num_heads=config.decoder.num_heads,
            num_kv_heads=config.decoder.num_heads,
            head_width=config.head_width,
            rotated=0,
            scaling=config.head_width**-0.5,
        ),
        gate=_gate(read, config, f"{at}.ffn.router.classifier") if is_sparse else None,
        mlp=mlp,
        cross=cross,
    )


def _switch_layer(
    read: _Reader,
    config: EncoderDecoderConfig,
    prefix: str,
    idx: int,
    is_decoder: bool,
    is_sparse: bool,
    form: ExpertForm,
    by_distance: Tensor | None,
) -> LayerWeights:
    at = f"{prefix}.block.{idx}.layer"
    last = 2 if is_decoder else 1

    def joined(attention: str, names: str) -> Tensor:
        return torch.cat([read(f"{at}.{attention}.{name}.weight") for name in names])

    cross: CrossAttentionWeights | None = None
    if is_decoder:
        cross = CrossAttentionWeights(
            norm=_norm(read, f"{at}.1.layer_norm", config),
            query=joined("1.EncDecAttention", "q"),
            key_value=joined("1.EncDecAttention", "kv"),
            out=joined("1.EncDecAttention", "o"),
        )
    mlp: MlpWeights | None = None
    if not is_sparse:
        mlp = MlpWeights(
            gate=None, up=read(f"{at}.{last}.mlp.wi.weight"), down=read(f"{at}.{last}.mlp.wo.weight"), form=form
        )
    return LayerWeights(
        input_norm=_norm(read, f"{at}.0.layer_norm", config),
        output_norm=_norm(read, f"{at}.{last}.layer_norm", config),
        attention=AttentionWeights(
            qkv=joined("0.SelfAttention", "qkv"),
            out=joined("0.SelfAttention", "o"),
            num_heads=config.decoder.num_heads,
            num_kv_heads=config.decoder.num_heads,
            head_width=config.head_width,
            rotated=0,
            scaling=1.0,
            by_distance=by_distance,
        ),
        gate=_gate(read, config, f"{at}.{last}.mlp.router.classifier") if is_sparse else None,
        mlp=mlp,
        cross=cross,
    )


def _norm(read: _Reader, name: str, config: EncoderDecoderConfig) -> NormWeights:
    is_centred = config.model_type == NLLB
    return NormWeights(
        weight=read(f"{name}.weight"),
        bias=read(f"{name}.bias") if is_centred else None,
        eps=config.norm_eps,
        is_centred=is_centred,
    )


def _gate(read: _Reader, config: EncoderDecoderConfig, name: str) -> GateWeights:
    """NLLB-MoE divides the two highest by their sum, before or after it drops tokens, of which none is dropped here."""
    return GateWeights(
        weight=read(f"{name}.weight", torch.float32),
        bias=read(f"{name}.bias", torch.float32) if config.has_gate_bias else None,
        top_k=config.top_k,
        norm_power=1.0 if config.top_k > 1 else 0.0,
        scale=config.expert_scale,
    )


def _sinusoids(config: EncoderDecoderConfig) -> Tensor:
    """What NLLB-MoE adds to an embedding by its position, [max_positions + 1, D]; the last row is padding's, zeros."""
    half = config.d_model // 2
    rates = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(config.pad_id + 1, config.pad_id + 1 + config.max_positions).float()[:, None] * rates
    table = torch.zeros(config.max_positions + 1, config.d_model)
    table[:-1, :half], table[:-1, half : 2 * half] = angles.sin(), angles.cos()
    return table


def _by_distance(config: EncoderDecoderConfig, table: Tensor, *, is_decoder: bool) -> Tensor:
    """Spread a table [buckets, H] of biases over distances: [H, farthest + 1] back, or [H, 2 * farthest + 1] both ways.

    From max_distance on there is one bucket. The buckets are T5's (Raffel et al., 2020).
    """
    far = min(config.max_distance, _FARTHEST)
    distance = torch.arange(far + 1) if is_decoder else torch.arange(-far, far + 1)
    num = config.num_buckets if is_decoder else config.num_buckets // 2
    ahead = 0 if is_decoder else (distance > 0).long() * num
    distance, exact = distance.abs(), num // 2
    wide = torch.log(distance.float() / exact) / math.log(config.max_distance / exact) * (num - exact)
    wide = (exact + wide.clamp(min=0).long()).clamp(max=num - 1)
    return table[ahead + torch.where(distance < exact, distance, wide)].T.contiguous()
