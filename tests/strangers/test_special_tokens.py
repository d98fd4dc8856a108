"""Special tokens that stand beside tokenizer.json: ids and skipping as transformers' AutoTokenizer has them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.tokenizer import Tokenizer
from tests.tokenizer_kinds import byte_level, llama, unigram, word_piece

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Some are in the vocabulary of tokenizer.json, some among its added tokens, the rest nowhere.
TOKENS = ("<s>", "</s>", "<pad>", "<unk>", "[MASK]", "<|im_end|>", "<image>", "<audio>", "<extra_0>", "<extra_1>")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "cls_token", "sep_token")
MODEL_NAMES = ("image_token", "audio_token", "boi_token", "eot_token")
TEXT = "a <s>hello</s> b<|im_end|>\n<image> <audio>x <extra_0><extra_1> [MASK] <pad><unk> don't"


def write(folder: Path, files: dict[str, Any], maker: Any = byte_level) -> Path:
    inner = maker()
    inner.add_special_tokens(["<s>", "<|im_end|>"])
    inner.add_tokens(["<extra_0>"])
    inner.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def check(folder: Path) -> None:
    """Compare with transformers: ids, decoding, and the names that templates get."""
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = Tokenizer.load(folder)
    assert ours is not None
    files = {path.name: path.read_text() for path in folder.iterdir() if path.name != "tokenizer.json"}
    for text in (TEXT, TEXT.replace(" ", ""), "</s>"):
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
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_skipping_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(write(tmp_path, FOLDERS[name]))


def draw_files(random_: random.Random) -> dict[str, Any]:
    def token(is_full: bool = False) -> Any:
        content = random_.choice(TOKENS)
        flags = {flag: random_.random() < 0.2 for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        return written(content, **flags, special=random_.random() < 0.6) if is_full else content

    config: dict[str, Any] = dict(FAST)
    for name in random_.sample((*NAMES, *MODEL_NAMES), random_.randrange(5)):
        is_full = random_.random() < 0.3
        config[name] = token(is_full) | {"__type": "AddedToken"} if is_full else token()
    if random_.random() < 0.4:
        listed = [token(is_full=True) for _ in range(random_.randrange(4))]
        config["added_tokens_decoder"] = {str(random_.randrange(418, 440)): one for one in listed}
    if random_.random() < 0.4:
        key = random_.choice(("extra_special_tokens", "additional_special_tokens"))
        config[key] = [token() for _ in range(random_.randrange(4))]
    elif random_.random() < 0.3:
        config["extra_special_tokens"] = {random_.choice(MODEL_NAMES): token() for _ in range(2)}
    files: dict[str, Any] = {CONFIG: config}
    if random_.random() < 0.4:
        entries = {name: token() for name in random_.sample((*NAMES, *MODEL_NAMES), random_.randrange(4))}
        for name in entries:
            if random_.random() < 0.3:
                entries[name] = {k: v for k, v in token(is_full=True).items() if k != "special"}
        if random_.random() < 0.4:
            entries["additional_special_tokens"] = [token() for _ in range(2)]
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
