"""The steps of a tokenizer that transformers takes from its own classes, whatever tokenizer.json says.

Owns which class AutoTokenizer reads a checkpoint of a served model type with, and what the classes that such
checkpoints name make of tokenizer.json: vocabulary, merges and post-processor are the file's; normalizer,
pre-tokenizer, decoder and the model's options are the class's. Adds no token.
Source: transformers 5.23, AutoTokenizer.from_pretrained, TokenizersBackend.convert_to_native_format, and the classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from collegium.fabric.errors import FailedPrecondition

MODEL_CONFIG = "config.json"
GENERIC = "TokenizersBackend"  # takes tokenizer.json as it is
# The class of each served model type for which transformers has one. A class that a checkpoint names wins over it,
# unless it is GENERIC.
CLASSES_BY_MODEL_TYPE: Mapping[str, str] = {
    "dbrx": "GPT2Tokenizer",
    "ernie4_5_moe": GENERIC,
    "glm4_moe": GENERIC,
    "granitemoe": GENERIC,
    "minimax_m2": GENERIC,
    "mixtral": GENERIC,
    "nllb-moe": "NllbTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "phimoe": GENERIC,
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "switch_transformers": "T5Tokenizer",
}
# Classes that make their own steps too, and that no published checkpoint of a served model type is known to name.
_FOREIGN = """
Albert Bart Barthez Bert BigBird Blenderbot CLIP Camembert CodeGen CodeLlama Cohere DPRContextEncoder
DPRQuestionEncoder DPRReader Deberta DebertaV2 DistilBert Esmc Funnel Gemma Herbert Lasr LayoutLMv2
LayoutLMv3 LayoutXLM Luke MBart MBart50 MLuke MPNet MarkupLM MobileBert Nllb Nougat OpenAIGPT Pegasus
Qwen3_5 Reformer RemBert RoFormer Roberta SeamlessM4T Siglip2 Splinter SqueezeBert T5 Tipsv2 Udop
VideoPrism Whisper XGLM XLMRoberta XLNet
"""
FOREIGN_CLASSES = frozenset(f"{name}Tokenizer" for name in _FOREIGN.split())
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a class puts around and into the model of bytes and merges. Components of the tokenizers library."""

    options: _Fields
    normalizer: Any = None
    pre_tokenizer: Any
    decoder: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingClass:
    """What reading with one of transformers' classes does.

    steps: makes the class's own of tokenizer_config.json; None if it takes the file's. tokens: named special tokens
    that the class has if the files do not mention the name. repeats_special_tokens: it adds all of them once more, as
    plain ones. foreign_name: its name, if it makes its own steps and is not imitated.
    """

    steps: Callable[[_Fields], Steps] | None = None
    tokens: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    repeats_special_tokens: bool = False
    keeps_post_processor: bool = True
    foreign_name: str = ""

    def rebuilt(self, inner: tokenizers.Tokenizer, config: _Fields, path: Path) -> tokenizers.Tokenizer:
        """Return what the class makes of a tokenizer read from `path`, without added tokens; `inner` if the same.

        FailedPrecondition if the class cannot read such a file.
        """
        if self.steps is None:
            return inner
        steps = self.steps(config)
        model = cast("dict[str, Any]", json.loads(inner.to_str())["model"])
        vocab = model["vocab"]
        if isinstance(vocab, list):  # Unigram: [token, score] each
            vocab = {token: token_id for token_id, (token, _) in enumerate(cast("list[tuple[str, float]]", vocab))}
        merges = [tuple(merge) for merge in cast("list[list[str]]", model.get("merges", ()))]
        try:
            made = tokenizers.Tokenizer(models.BPE(vocab, merges, **steps.options))  # pyright: ignore[reportArgumentType]
        except Exception as error:  # tokenizers raises plain Exception
            raise FailedPrecondition(
                f"{path} cannot be read as tokenizer_class says: {error}", remedy="repair tokenizer_config.json"
            ) from error
        if steps.normalizer is not None:
            made.normalizer = steps.normalizer
        made.pre_tokenizer = steps.pre_tokenizer
        made.decoder = steps.decoder
        if self.keeps_post_processor and inner.post_processor is not None:
            made.post_processor = inner.post_processor
        return made


def reading_class(model: _Fields, config: _Fields, path: Path) -> ReadingClass:
    """Find the class that AutoTokenizer reads a checkpoint with.

    model: what config.json holds; config: what tokenizer_config.json holds; path: its tokenizer.json.
    """
    name = _class_name(model, config, path)
    return IMITATED.get(name) or ReadingClass(foreign_name=name if name in FOREIGN_CLASSES else "")


def _class_name(model: _Fields, config: _Fields, path: Path) -> str:
    declared = _declared(config) or _declared(model)
    by_type = CLASSES_BY_MODEL_TYPE.get(str(model.get("model_type")), "")
    if not declared:
        return by_type or GENERIC
    if _names_own_code(config):  # which nobody here runs; then the class counts, whatever the model type
        return declared
    if by_type == GENERIC or (declared == "LlamaTokenizer" and b'"ByteLevel"' in path.read_bytes()):
        return GENERIC
    return declared


def _declared(fields: _Fields) -> str:
    name = fields.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _names_own_code(config: _Fields) -> bool:
    named = config.get("auto_map")
    return bool(cast("_Fields", named).get("AutoTokenizer") if isinstance(named, dict) else named)


def _llama(config: _Fields) -> Steps:
    has_space = _has_space(config, default=True)
    scheme = ("always" if config.get("legacy") else "first") if has_space else "never"
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return Steps(
        options={"fuse_unk": True, "byte_fallback": True},
        pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False),
        decoder=decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if has_space else decoding),
    )


def _qwen2(config: _Fields) -> Steps:
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=_has_space(config), use_regex=False)
    return _byte_level(pre_tokenizers.Sequence([split, byte_level]), normalizers.NFC())


def _gpt2(config: _Fields) -> Steps:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=_has_space(config)))


def _gpt_neox(config: _Fields) -> Steps:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=_has_space(config)), normalizers.NFC())


def _byte_level(pre_tokenizer: object, normalizer: object = None) -> Steps:
    return Steps(
        options={"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        decoder=decoders.ByteLevel(),
    )


def _has_space(config: _Fields, *, default: bool = False) -> bool:
    value = config.get("add_prefix_space")
    return default if value is None else bool(value)


IMITATED: Mapping[str, ReadingClass] = {
    "LlamaTokenizer": ReadingClass(
        steps=_llama, tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ),
    "Qwen2Tokenizer": ReadingClass(
        steps=_qwen2,
        tokens={"unk_token": _END, "eos_token": _END, "pad_token": _END},
        repeats_special_tokens=True,
    ),
    "GPT2Tokenizer": ReadingClass(
        steps=_gpt2, tokens={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}
    ),
    "GPTNeoXTokenizer": ReadingClass(
        steps=_gpt_neox,
        tokens={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
        keeps_post_processor=False,
    ),
}
