"""The three workloads of `benchmarks/paper.py`, scaled down: whole models of which only the way of the experts changes.

Owns the checkpoints (random weights; experts, top-k, capacity and every how many layers are the paper's) and two ways
to run them: by the modelling classes of transformers with the experts of each MoE layer exchanged, and as Collegium
serves them, engine, links and worker in one process.
T tokens, B sequences, E experts, D model.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, NllbMoeConfig, Qwen3MoeConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.gating_layers import IMPLEMENTATIONS, Bank
from benchmarks.one_process import OneProcess, Request
from benchmarks.ways import told_of_one
from collegium.model.architectures import Activation

_PAST = 16  # positions that a decoder's step looks back at, and of its source
_DECODED = 10  # tokens of a sequence while steps are timed
_TOP_K = 2
_FIRST_ID = 10  # ids below it are special
_VOCAB = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A workload of the paper. theirs: gain of dynamic over static gating in maximum throughput, on one node."""

    name: str
    folder: str
    length: int  # tokens of a sequence; of a decoder, 1: a batch of T tokens is a step of T sequences
    capacity: float
    theirs: float
    theirs_tutel: float


LM = Workload(name="LM", folder="lm", length=128, capacity=0.05, theirs=6.21, theirs_tutel=3.32)
ENCODER = Workload(name="MT encoder", folder="mt", length=32, capacity=1.0, theirs=5.75, theirs_tutel=5.33)
DECODER = Workload(name="MT decoder", folder="mt", length=1, capacity=1.0, theirs=2.58, theirs_tutel=1.88)
WORKLOADS = (LM, ENCODER, DECODER)
# Policies of the paper, and what they are here.
POLICIES = {"static": "static_gshard", "padded": "padded", "block-sparse": "block_sparse", "dynamic": "ours"}


def write_checkpoint(workload: Workload, out: Path) -> None:
    """Write a workload's checkpoint: experts, top-k and their layers as in the paper, widths and depth cut."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config: Any
    if workload is LM:  # the paper's: 24 layers, d 1024, ffn 4096, experts in every second layer
        config = Qwen3MoeConfig(
            vocab_size=_VOCAB,
            hidden_size=256,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            num_experts=512,
            num_experts_per_tok=_TOP_K,
            decoder_sparse_step=2,
            norm_topk_prob=True,
            max_position_embeddings=512,
            **ids,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:  # the paper's: 24 + 24 layers, d 2048, ffn 8192, experts in every fourth layer
        config = NllbMoeConfig(
            vocab_size=_VOCAB,
            d_model=256,
            encoder_layers=4,
            decoder_layers=4,
            encoder_ffn_dim=1024,
            decoder_ffn_dim=1024,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_sparse_step=4,
            decoder_sparse_step=4,
            num_experts=128,
            max_position_embeddings=512,
            moe_token_dropout=0.0,
            decoder_start_token_id=2,
            **ids,
        )
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)


class Whole:
    """A workload by transformers; `use` says how its MoE layers run their experts from the next call on."""

    def __init__(self, workload: Workload, folder: Path):
        """Load the checkpoint in float32."""
        self.workload = workload
        kind = AutoModelForCausalLM if workload is LM else AutoModelForSeq2SeqLM
        self._model: Any = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        part = {LM.name: "", ENCODER.name: "model.encoder.", DECODER.name: "model.decoder."}[workload.name]
        self._blocks: list[_Exchanged] = []
        for name, module in list(self._model.named_modules()):
            if name.startswith(part) and isinstance(module, Qwen3MoeSparseMoeBlock | NllbMoeSparseMLP):
                exchanged = _Exchanged(module, workload.capacity)
                parent, _, attribute = name.rpartition(".")
                setattr(self._model.get_submodule(parent), attribute, exchanged)
                self._blocks.append(exchanged)

    @property
    def bank(self) -> Bank:
        """The experts of the first MoE layer."""
        return self._blocks[0].bank

    @property
    def num_bytes(self) -> int:
        """Bytes of the workload's weights: the experts, and what else its passes read."""
        part = {LM.name: self._model, ENCODER.name: None, DECODER.name: None}[self.workload.name]
        if part is None:
            part = self._model.model.encoder if self.workload is ENCODER else self._model.model.decoder
        seen = {id(one): one.nbytes for one in part.parameters()}
        return sum(seen.values()) + sum(block.bank.num_bytes for block in self._blocks)

    @property
    def flops(self) -> int:
        """Floating-point operations of a token's matmuls, embedding and head left out; what a decoder keeps of a source
        is the encoder's.
        """
        model = self._model.model
        stack = model if self.workload is LM else model.encoder if self.workload is ENCODER else model.decoder
        kept = list(stack.layers.parameters())
        if self.workload is ENCODER:
            for layer in model.decoder.layers:
                kept += [*layer.cross_attention.k_proj.parameters(), *layer.cross_attention.v_proj.parameters()]
        if self.workload is DECODER:
            for layer in stack.layers:
                taken = [*layer.cross_attention.k_proj.parameters(), *layer.cross_attention.v_proj.parameters()]
                kept = [one for one in kept if all(one is not each for each in taken)]
        experts = sum(
            block.bank.num_bytes // block.bank.up.itemsize // block.bank.num_experts for block in self._blocks
        )
        return 2 * (sum(one.numel() for one in kept) + _TOP_K * experts)

    def use(self, policy: str) -> None:
        """Have the layers run their experts so."""
        for block in self._blocks:
            block.use(POLICIES[policy])

    def call(self, tokens: int) -> Callable[[], Tensor]:
        """Make a pass over a batch of T tokens that can be repeated: it changes nothing that the next one sees."""
        rng = torch.Generator().manual_seed(tokens)
        length = min(tokens, self.workload.length)
        ids = torch.randint(_FIRST_ID, _VOCAB, (tokens // length, length), generator=rng)
        if self.workload is LM:
            return lambda: self._model(ids, use_cache=False, logits_to_keep=1).logits
        if self.workload is ENCODER:
            return lambda: self._model.model.encoder(ids).last_hidden_state
        config = self._model.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        encoded = torch.randn(tokens, _PAST, config.d_model, generator=rng)
        before = torch.randint(_FIRST_ID, _VOCAB, (tokens, _PAST), generator=rng)
        decoder = self._model.model.decoder
        self.use("dynamic")
        decoder(before, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True)

        def step() -> Tensor:
            out = decoder(ids, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True)
            cache.self_attention_cache.crop(-1)
            logits: Tensor = self._model.lm_head(out.last_hidden_state)
            return logits

        return step


class _Exchanged(nn.Module):
    """Stands where an MoE block stood: the same gate, top-2, over experts that are run in any manner."""

    def __init__(self, block: Any, capacity: float):
        super().__init__()
        self._gate = block.gate.weight if isinstance(block, Qwen3MoeSparseMoeBlock) else block.router.classifier.weight
        if isinstance(block, Qwen3MoeSparseMoeBlock):
            experts = block.experts
            self.bank = Bank(up=experts.gate_up_proj.data, down=experts.down_proj.data, capacity=capacity)
        else:
            experts = [block.experts[f"expert_{idx}"] for idx in range(block.num_experts)]
            self.bank = Bank(
                up=torch.stack([one.fc1.weight.data for one in experts]),
                down=torch.stack([one.fc2.weight.data for one in experts]),
                up_bias=torch.stack([one.fc1.bias.data for one in experts]),
                down_bias=torch.stack([one.fc2.bias.data for one in experts]),
                capacity=capacity,
                activation=Activation.RELU,
            )
        self._made = {name: IMPLEMENTATIONS[name](self.bank) for name in POLICIES.values()}
        self._run = self._made[POLICIES["dynamic"]]

    def use(self, name: str) -> None:
        self._run = self._made[name]

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = F.linear(rows, self._gate).softmax(-1).topk(_TOP_K, -1)
        return self._run(rows, ids, weights / weights.sum(-1, keepdim=True)).view(hidden_states.shape)


class Served:
    """The same checkpoint as Collegium serves it: engine, links and one worker, in this process."""

    def __init__(self, workload: Workload, folder: Path, *, most_tokens: int, num_threads: int):
        """Start, in float32; most_tokens: of one step."""
        self.workload, self._most_tokens = workload, most_tokens
        self._draw = random.Random(0)
        running = OneProcess(
            folder,
            num_threads=num_threads,
            worker_threads=num_threads,
            max_batch_tokens=2 * most_tokens if workload is DECODER else most_tokens,  # while some decode, others come
            max_num_seqs=most_tokens,
            kv_tokens=most_tokens * 6 * _PAST if workload is DECODER else 4 * most_tokens,
        )
        self._told = ExitStack()
        self.running = self._told.enter_context(told_of_one(running, f"{workload.name}, served"))

    def close(self) -> None:
        """End it, and say which way its rows went."""
        self._told.close()

    def seconds(self, tokens: int) -> float:
        """Seconds of a batch of T tokens, none of which is in a cache; of a decoder, of one step of T sequences."""
        if self.workload is DECODER:
            return self._step_seconds(tokens)
        length = min(tokens, self.workload.length)
        requests = [self._request(length, 1) for _ in range(tokens // length)]
        began_s = time.perf_counter()
        self.running.run(requests)
        return time.perf_counter() - began_s

    def _request(self, length: int, max_tokens: int) -> Request:
        ids = [self._draw.randrange(_FIRST_ID, _VOCAB) for _ in range(length)]
        if self.workload is LM:
            return Request(prompt_ids=ids, max_tokens=max_tokens)
        return Request(source_ids=ids, prompt_ids=[2], max_tokens=max_tokens)

    def _step_seconds(self, tokens: int) -> float:
        """While all decode, each token's share of the time, times T."""
        apart = 2 * tokens * (_PAST + 1) // self._most_tokens  # steps from the first source's to the last one's
        answers = self.running.run([self._request(_PAST, _PAST + _DECODED + apart) for _ in range(tokens)])
        stamps = [choice.arrived_s for (choice,) in answers]
        begin, end = max(one[_PAST] for one in stamps), min(one[-1] for one in stamps)
        between = [stamp for one in stamps for stamp in one if begin < stamp <= end]
        if not between:
            raise RuntimeError(f"{tokens} sequences never decoded together")
        return (end - begin) / len(between) * tokens


def powers(most: int) -> Sequence[int]:
    """1, 2, 4 ... most."""
    return list(itertools.takewhile(lambda n: n <= most, (1 << n for n in itertools.count())))
