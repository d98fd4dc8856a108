"""What stands beside tokenizer.json, special tokens and classes: ids and texts as AutoTokenizer has them."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import tokenization_auto

from collegium.model.architectures import ARCHITECTURES
from gateway.pipelines import CLASSES_BY_MODEL_TYPE, FOREIGN_CLASSES, GENERIC, IMITATED
from gateway.tokenizer import Tokenizer
from tests.tokenizer_kinds import byte_level, llama, unigram, word_piece

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Some are in the vocabulary of tokenizer.json, some among its added tokens, the rest nowhere.
TOKENS = ("<s>", "</s>", "<pad>", "<unk>", "[MASK]", "<|im_end|>", "<image>", "<audio>", "<extra_0>", "<extra_1>")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "cls_token", "sep_token")
MODEL_NAMES = ("image_token", "audio_token", "boi_token", "eot_token")
TEXT = "a <s>hello</s> b<|im_end|>\n<image> <audio>x <extra_0><extra_1> [MASK] <pad><unk> don't"


@functools.cache
def file_of(maker: Any, padding: str | None) -> str:
    inner = maker()
    inner.add_special_tokens(["<s>", "<|im_end|>"])
    inner.add_tokens(["<extra_0>"])
    begins = [("<s>", inner.token_to_id("<s>"))]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=begins)
    if padding is not None:
        inner.enable_padding(pad_token=padding)
    return inner.to_str()


def write(folder: Path, files: dict[str, Any], maker: Any = byte_level) -> Path:
    (folder / "tokenizer.json").write_text(file_of(maker, files.get(PADDING)))
    for name in files.keys() - {PADDING}:
        (folder / name).write_text(json.dumps(files[name]))
    return folder


def check(folder: Path) -> None:
    """Compare with transformers: ids, decoding, and the names that templates get."""
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except TypeError:  # of a token's fields that it does not take for a token; we do
        assert Tokenizer.load(folder) is not None
        return
    ours = Tokenizer.load(folder)
    assert ours is not None
    files = {path.name: path.read_text() for path in folder.iterdir() if path.name != "tokenizer.json"}
    for text in (TEXT, TEXT.replace(" ", ""), "</s>", "  a\n\n 123 ab</s> lo", "\u0065\u0301", ""):
        assert ours.encode(text) == theirs(text)["input_ids"], files
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), files
    every_id = list(range(len(theirs)))
    for token_id in every_id[-16:]:
        assert ours.decode([token_id]) == theirs.decode([token_id], skip_special_tokens=True), (token_id, files)
    names = [name for name in (*NAMES, *MODEL_NAMES) if name in theirs.special_tokens_map]
    template = "|".join("{{ " + name + " }}" for name in (*NAMES, *MODEL_NAMES))
    (folder / "chat_template.jinja").write_text(template)
    named = Tokenizer.load(folder)
    assert named is not None and named._chat is not None
    assert named._chat.render([("user", "x")]) == "|".join(
        theirs.special_tokens_map[name] if name in names else "" for name in (*NAMES, *MODEL_NAMES)
    ), files


def written(content: str, **fields: Any) -> dict[str, Any]:
    plain = {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return plain | fields


OWN = "model_specific_special_tokens"
TYPED = {"__type": "AddedToken"}
PADDING = "padding"  # in tokenizer.json
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
FOLDERS: dict[str, dict[str, Any]] = {
    "named in the config": {CONFIG: FAST | {"eos_token": "</s>", "pad_token": "<pad>"}},
    "named and written out": {CONFIG: FAST | {"eos_token": written("</s>", __type="AddedToken")}},
    "listed by id in the config": {
        CONFIG: FAST | {"added_tokens_decoder": {"420": written("</s>", special=True), "500": written("<image>")}}
    },
    "listed as not special": {CONFIG: FAST | {"added_tokens_decoder": {"420": written("</s>", special=False)}}},
    "listed as not special, and named": {
        CONFIG: FAST | {"eos_token": "</s>", "added_tokens_decoder": {"420": written("</s>", special=False)}}
    },
    "a name of this model alone": {CONFIG: FAST | {"image_token": "<image>", "audio_token": "<audio>"}},
    "extra tokens": {CONFIG: FAST | {"extra_special_tokens": ["</s>", "<extra_1>"]}},
    "extra tokens by name": {CONFIG: FAST | {"extra_special_tokens": {"image_token": "<image>", "boi_token": "</s>"}}},
    "extra tokens as before": {CONFIG: FAST | {"additional_special_tokens": ["</s>", "<extra_0>"]}},
    "both kinds of extra tokens": {
        CONFIG: FAST | {"additional_special_tokens": ["</s>"], "extra_special_tokens": ["<extra_1>"]}
    },
    "the map of special tokens": {
        CONFIG: FAST,
        SPECIAL_MAP: {"eos_token": written("</s>"), "pad_token": "<pad>", "additional_special_tokens": ["<image>"]},
    },
    "the map wins over the config": {CONFIG: FAST | {"eos_token": "<pad>"}, SPECIAL_MAP: {"eos_token": "</s>"}},
    "the map is not read beside a list": {
        CONFIG: FAST | {"added_tokens_decoder": {"420": written("<image>", special=True)}},
        SPECIAL_MAP: {"eos_token": "</s>"},
    },
    "added tokens": {CONFIG: FAST | {"eos_token": "</s>"}, ADDED: {"</s>": 430, "<image>": 431}},
    "added tokens, none of them special": {CONFIG: FAST, ADDED: {"</s>": 430, "<image>": 431}},
    "a token of the file becomes special by its name": {CONFIG: FAST | {"eos_token": "<extra_0>"}},
    "spaces taken away": {
        CONFIG: FAST | {"added_tokens_decoder": {"420": written("<|im_end|>", special=True, lstrip=True, rstrip=True)}}
    },
    "special tokens split": {CONFIG: FAST | {"split_special_tokens": True, "eos_token": "</s>"}},
    "nothing": {CONFIG: FAST},
    "tokens of this model": {CONFIG: FAST | {OWN: {"image_token": "<image>", "boi": written("</s>", **TYPED)}}},
    "tokens of this model beside a name": {
        CONFIG: FAST | {OWN: {"image_token": "<image>"}, "audio_token": "<audio>", "eos_token": "</s>"}
    },
    "tokens of this model beside extra names": {
        CONFIG: FAST | {OWN: {"image_token": "<image>"}, "extra_special_tokens": {"boi_token": "</s>"}}
    },
    "tokens of this model beside a list of extra ones": {
        CONFIG: FAST | {OWN: {"image_token": "<image>"}, "extra_special_tokens": ["<audio>"]}
    },
    "tokens of this model beside extra names in the map": {
        CONFIG: FAST | {OWN: {"image_token": "<image>", "boi_token": "<audio>"}},
        SPECIAL_MAP: {"extra_special_tokens": {"boi_token": "</s>"}},
    },
    "tokens of this model and a list by id": {
        CONFIG: FAST | {OWN: {"boi": "<image>"}, "added_tokens_decoder": {"420": written("<image>", lstrip=True)}}
    },
    "no tokens of this model": {CONFIG: FAST | {OWN: None}},
    "fields without a type under a name": {CONFIG: FAST | {"eos_token": written("</s>")}},
    "fields without a type under a name of this model": {CONFIG: FAST | {"image_token": written("<image>")}},
    "fields without a type in a list": {CONFIG: FAST | {"extra_special_tokens": [written("<image>"), "</s>"]}},
    "fields without a type by extra names": {CONFIG: FAST | {"extra_special_tokens": {"boi": written("<image>")}}},
    "fields with a type in a list": {CONFIG: FAST | {"extra_special_tokens": [written("<image>", **TYPED), "</s>"]}},
    "fields without a type in the map": {
        CONFIG: FAST,
        SPECIAL_MAP: {"eos_token": written("</s>", lstrip=True), "image_token": written("<image>")},
    },
    "fields in the map's list": {
        CONFIG: FAST,
        SPECIAL_MAP: {"extra_special_tokens": [written("<image>", lstrip=True), "</s>"]},
        ADDED: {"<image>": 431, "<audio>": 430},
    },
    "fields in the map's older list": {
        CONFIG: FAST,
        SPECIAL_MAP: {"additional_special_tokens": [written("<image>", **TYPED), written("<audio>")]},
    },
    "fields with a type in both lists": {
        CONFIG: FAST | {"extra_special_tokens": [written("<audio>", **TYPED)]},
        SPECIAL_MAP: {"extra_special_tokens": [written("<image>", rstrip=True)]},
        ADDED: {"<image>": 431, "<audio>": 430},
    },
    "a token for padding": {CONFIG: FAST, PADDING: "<pad>"},
    "a token for padding that the config does not want": {CONFIG: FAST | {"pad_token": None}, PADDING: "<pad>"},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_skipping_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(write(tmp_path, FOLDERS[name]))


def draw_files(random_: random.Random) -> dict[str, Any]:
    def token(is_full: bool = False) -> Any:
        content = random_.choice(TOKENS)
        flags = {flag: random_.random() < 0.2 for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        return written(content, **flags, special=random_.random() < 0.6) if is_full else content

    def typed(share: float = 0.9) -> Any:
        """Returns fields of a token, which are now and then not said to be one."""
        return token(is_full=True) | (TYPED if random_.random() < share else {})

    def plain() -> Any:
        """Returns fields without `special`, which the map says by itself, or a text."""
        fields = {name: value for name, value in typed(0.5).items() if name != "special"}
        return fields if random_.random() < 0.5 else token()

    def either() -> Any:
        return typed() if random_.random() < 0.2 else token()

    config: dict[str, Any] = dict(FAST)
    for name in random_.sample((*NAMES, *MODEL_NAMES), random_.randrange(5)):
        is_full = random_.random() < 0.3
        config[name] = typed(0.9 if name in NAMES else 0.5) if is_full else token()
    if random_.random() < 0.3:
        config[OWN] = {name: either() for name in random_.sample(("own", "boi_token", "image_token", "eos_token"), 2)}
    if random_.random() < 0.4:
        listed = [token(is_full=True) for _ in range(random_.randrange(4))]
        config["added_tokens_decoder"] = {str(random_.randrange(418, 440)): one for one in listed}
    if random_.random() < 0.4:
        key = random_.choice(("extra_special_tokens", "additional_special_tokens"))
        config[key] = [either() for _ in range(random_.randrange(4))]
    elif random_.random() < 0.3:
        config["extra_special_tokens"] = {random_.choice(MODEL_NAMES): either() for _ in range(2)}
    files: dict[str, Any] = {CONFIG: config}
    if random_.random() < 0.4:
        entries = {name: token() for name in random_.sample((*NAMES, *MODEL_NAMES), random_.randrange(4))}
        for name in entries:
            if random_.random() < 0.3:
                entries[name] = {k: v for k, v in token(is_full=True).items() if k != "special"}
        if random_.random() < 0.4:
            key = random_.choice(("additional_special_tokens", "extra_special_tokens"))
            entries[key] = [either() if key.startswith("add") else plain() for _ in range(2)]
        files[SPECIAL_MAP] = entries
    if random_.random() < 0.4:
        files[ADDED] = {random_.choice(TOKENS): 430 + number for number in range(random_.randrange(4))}
    if random_.random() < 0.2:
        config["clean_up_tokenization_spaces"] = True
    return files


@pytest.mark.parametrize("maker", [byte_level, llama, unigram, word_piece])
def test_any_mixture_of_files_gives_what_transformers_gives(maker: Any, tmp_path: Path) -> None:
    random_ = random.Random(maker.__name__)
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(write(folder, draw_files(random_), maker))


# Classes that make their own steps.

CLASSES = ("LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")
FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"add_prefix_space": False},
    {"add_prefix_space": True, "legacy": True},
    {"legacy": True, "add_bos_token": True, "add_eos_token": True},
    {"add_prefix_space": False, "legacy": False, "add_bos_token": False},
)


@pytest.mark.parametrize("maker", [byte_level, llama, unigram, word_piece])
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_makes_the_steps_that_it_makes_in_transformers(name: str, maker: Any, tmp_path: Path) -> None:
    random_ = random.Random(name + maker.__name__)
    for number, flags in enumerate(FLAGS):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = draw_files(random_) if number else {CONFIG: {}}
        files[CONFIG] |= flags | {"tokenizer_class": name + "Fast" * (number % 2)}
        if number == 2:  # a token that is special for classes that add such tokens twice
            files[CONFIG] |= {"extra_special_tokens": ["</s>"], "added_tokens_decoder": {"2": written("</s>")}}
        check(write(folder, files, maker))


def test_every_class_that_makes_its_own_steps_is_imitated_or_told() -> None:
    base = transformers.PreTrainedTokenizerFast
    names = [name for name in dir(transformers) if name.endswith("Tokenizer")]
    found = {name: getattr(transformers, name) for name in names}
    own = {
        name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, base) and is_own(kind, base)
    }
    assert own == IMITATED.keys() | FOREIGN_CLASSES


def is_own(kind: type, base: type) -> bool:
    return kind is not base and "__init__" in kind.__dict__


def test_the_classes_of_model_types_are_those_of_transformers() -> None:
    theirs = {name: tokenization_auto.TOKENIZER_MAPPING_NAMES.get(name) for name in ARCHITECTURES}
    generic = {GENERIC, "MistralCommonBackend"}  # the latter where its library is installed and the file is another
    assert {name: GENERIC if kind in generic else kind for name, kind in theirs.items() if kind} == (
        CLASSES_BY_MODEL_TYPE
    )


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_class_is_chosen_by_what_the_files_name_and_the_model_type(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type)
    random_ = random.Random(model_type)
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings: dict[str, Any] = {"eos_token": "</s>"}
        name = random_.choice((*CLASSES, None, "PreTrainedTokenizerFast", "NoSuchTokenizer"))
        if name is not None:
            settings["tokenizer_class"] = name + random_.choice(("", "Fast")) * name.endswith("Tokenizer")
        if random_.random() < 0.2:
            settings["auto_map"] = {"AutoTokenizer": ["own.Tokenizer", None]} if name in CLASSES else {}
        config.tokenizer_class = random_.choice((None, *CLASSES)) if name is None else None
        config.save_pretrained(folder)
        check(write(folder, {CONFIG: settings}, random_.choice((byte_level, llama))))


@pytest.mark.parametrize("name", ["BertTokenizer", "CohereTokenizerFast"])
def test_a_class_that_is_not_imitated_is_told_and_the_file_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    plain, foreign = tmp_path / "plain", tmp_path / "foreign"
    for folder, config in ((plain, FAST), (foreign, {"tokenizer_class": name})):
        folder.mkdir()
        write(folder, {CONFIG: config})
    ours, wanted = Tokenizer.load(foreign), Tokenizer.load(plain)
    assert ours is not None and wanted is not None
    assert (ours.foreign_class, wanted.foreign_class) == (name.removesuffix("Fast"), "")
    assert ours.encode(TEXT) == wanted.encode(TEXT)
