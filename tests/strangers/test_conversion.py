"""Checkpoints without tokenizer.json: converted by transformers if it can, else told in one line at the start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from collegium.fabric.errors import FailedPrecondition
from collegium.model import convert_tokenizer
from collegium.model.convert_tokenizer import ConversionError, convert
from gateway import converted
from gateway.converted import tokenizer_folder
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig
from tests.tokenizer_kinds import byte_level, corpus_text, word_piece

Files = dict[str, str]


def bpe_files() -> Files:
    model = json.loads(byte_level().to_str())["model"]
    return {
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]),
    }


def word_files() -> Files:
    vocab = json.loads(word_piece().to_str())["model"]["vocab"]
    return {"vocab.txt": "\n".join(sorted(vocab, key=vocab.__getitem__))}


def write(folder: Path, files: Files, *, model_type: str, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


CHECKPOINTS: dict[str, tuple[Callable[[], Files], dict[str, Any]]] = {
    "Qwen": (bpe_files, {"model_type": "qwen3_moe", "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}),
    "Qwen without a config": (bpe_files, {"model_type": "qwen2_moe"}),
    "GPT-2": (bpe_files, {"model_type": "olmoe", "tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}),
    "GPT-NeoX": (bpe_files, {"model_type": "olmoe", "tokenizer_class": "GPTNeoXTokenizerFast"}),
    "GPT-NeoX with a first token": (
        bpe_files,
        {"model_type": "olmoe", "tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<s>", "add_bos_token": True},
    ),
    "BERT": (word_files, {"model_type": "qwen3_moe", "tokenizer_class": "BertTokenizer", "image_token": "<image>"}),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Convert in this process, which has transformers already; gives the modules that a child would have run."""
    ran: list[str] = []

    async def run(module: str, arguments: Sequence[str], *, limit_s: float) -> str:
        ran.append(module)
        model_dir, out, *sources = arguments
        try:
            return convert(Path(model_dir), Path(out), sources)
        except ConversionError as error:
            raise FailedPrecondition(str(error)) from None

    monkeypatch.setattr(converted, "run_child", run)
    return ran


@pytest.mark.parametrize("name", CHECKPOINTS)
async def test_a_converted_tokenizer_is_transformers_own(name: str, tmp_path: Path, children: list[str]) -> None:
    make, config = CHECKPOINTS[name]
    template = "{{ eos_token }}{{ image_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = tmp_path / "model"
    model.mkdir()
    write(model, make(), **config, chat_template=template)
    folder = await tokenizer_folder(model)
    assert folder is not None
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(model, local_files_only=True)
    assert ours is not None
    random_ = random.Random(name)
    for _ in range(20):
        text = corpus_text(random_, 12) + "<|im_end|><s> <|endoftext|><image>[SEP]"
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.encode_chat([("user", "hello")]) == theirs.apply_chat_template(messages, return_dict=False)


GUESSES: dict[str, tuple[dict[str, Any], str]] = {
    "a generic class": ({"model_type": "qwen3_moe", "tokenizer_class": "PreTrainedTokenizerFast"}, "Qwen2Tokenizer"),
    "no such class": ({"model_type": "mixtral", "tokenizer_class": "NoSuchTokenizer"}, "GPT2Tokenizer"),
    "another kind's class": ({"model_type": "granitemoe", "tokenizer_class": "BertTokenizer"}, "GPT2Tokenizer"),
    "no class": ({"model_type": "granitemoe"}, "GPT2Tokenizer"),
    "no class, and a config": ({"model_type": "glm4_moe", "eos_token": "<|im_end|>"}, "GPT2Tokenizer"),
    "a named class that the model type hides": ({"model_type": "granitemoe", "tokenizer_class": "GPT2Tokenizer"}, ""),
}


@pytest.mark.parametrize("name", GUESSES)
async def test_bytes_and_merges_are_read_whatever_class_is_named(
    name: str, tmp_path: Path, children: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config, guess = GUESSES[name]
    write(tmp_path, bpe_files(), **config)
    folder = await tokenizer_folder(tmp_path)
    assert [line["tokenizer_class"] for line in warnings_of(caplog)] == [guess] * bool(guess)
    assert folder is not None
    ours, theirs = Tokenizer.load(folder), byte_level()
    assert ours is not None
    for text in ("hello world", " don't  stop\n\n", "é 中"):
        if guess != "Qwen2Tokenizer":  # whose pieces are others
            assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.special_id("<|im_end|>") is not None or "eos_token" not in config


async def test_a_conversion_is_kept_until_a_file_changes(tmp_path: Path, children: list[str]) -> None:
    write(tmp_path, bpe_files(), model_type="qwen3_moe", tokenizer_class="Qwen2Tokenizer")
    first = await tokenizer_folder(tmp_path)
    assert await tokenizer_folder(tmp_path) == first
    assert len(children) == 1
    write(tmp_path, {}, model_type="qwen3_moe", tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>")
    second = await tokenizer_folder(tmp_path)
    assert second not in (None, first)
    assert len(children) == 2
    assert second is not None
    assert (tokenizer := Tokenizer.load(second)) is not None and tokenizer.special_id("<|im_end|>") is not None


async def test_a_read_only_home_is_no_hindrance(
    tmp_path: Path, children: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write(tmp_path, bpe_files(), model_type="qwen3_moe", tokenizer_class="Qwen2Tokenizer")
    folder = await tokenizer_folder(tmp_path)
    assert folder is not None and Tokenizer.load(folder) is not None


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    records = [r for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("collegium.")]
    return [{"event": record.message, **record.__dict__["collegium_fields"]} for record in records]


@pytest.mark.parametrize(
    ("files", "config", "found", "why"),
    [
        ({"tokenizer.model": "\n\x05no such"}, {"model_type": "mixtral"}, "tokenizer.model", "transformers cannot"),
        ({"vocab.json": "{", "merges.txt": ""}, {"model_type": "qwen3_moe"}, "vocab.json, merges.txt", "EOF"),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": ""},
            {"model_type": "granitemoe"},
            "vocab.json, merges.txt",
            "cannot",
        ),
        ({"vocab.txt": "a\nb\nc"}, {"model_type": "qwen3_moe"}, "vocab.txt", "does not read these files"),
    ],
)
async def test_what_cannot_be_converted_is_told_in_one_line_at_the_start(
    files: Files,
    config: dict[str, Any],
    found: str,
    why: str,
    tmp_path: Path,
    children: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, files, **config)
    async with rig(FakeRouter(), model_dir=tmp_path) as served:
        assert served.gateway.server.health.is_serving()
    (line,) = warnings_of(caplog)
    assert "no tokenizer.json" in line["event"] and "token_ids" in line["event"]
    assert (line["model"], line["found"]) == (tmp_path, found)
    assert why in line["conversion"] and "save_pretrained" in line["remedy"]
    assert not list((tmp_path / "cache" / "collegium" / "tokenizers").iterdir())


async def test_a_checkpoint_without_any_tokenizer_is_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {}, model_type="qwen3_moe")
    assert await tokenizer_folder(tmp_path) is None
    (line,) = warnings_of(caplog)
    assert line["event"] == "this checkpoint has no tokenizer: requests need token_ids"


@pytest.mark.parametrize("missing", ["transformers", "sentencepiece"])
async def test_a_library_that_is_not_installed_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"tokenizer.model": "\n\x05no such"}, model_type="mixtral")
    monkeypatch.setattr(convert_tokenizer, "_is_installed", lambda module: module != missing)
    with pytest.raises(ConversionError, match=f"{missing} is not installed here"):
        convert(tmp_path, tmp_path / "out", ["tokenizer.model"])


@pytest.mark.soak
async def test_a_child_process_converts(tmp_path: Path) -> None:
    write(tmp_path, bpe_files(), model_type="qwen3_moe", tokenizer_class="Qwen2Tokenizer")
    folder = await tokenizer_folder(tmp_path)
    assert folder is not None and (tokenizer := Tokenizer.load(folder)) is not None
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
