"""Small tokenizers of every kind that checkpoints bring, trained here on text of many scripts, and such text.

Each has special tokens, added tokens that are shown, and (beyond its last id) ids that mean nothing.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gateway.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "models" / "demo-lm"
SPECIAL = ("<s>", "</s>", "<|im_end|>")
SHOWN = ("<tool_call>", "<think>")

# Words, marks and spaces of texts that tokenizers meet: scripts with and without spaces, both directions, combining
# marks (composed and not), emoji with joiners, modifiers and flags, code, numbers, odd spaces, U+FFFD and U+2581.
_WORDS = """
the of hello world naïve nai\u0308ve Straße don't it's we've n't ' . , ? ! | Привет мир ёж 日本語 の テスト 中文 分词
한국어 안녕 สวัสดี नमस्ते हिन्दी বাংলা שלום עולם مرحبا بالعالم \u200f Ελλάδα Việt e\u0301\u0323 a\u0300\u0316\u0347
🙂 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤\ufe0f 🏳\ufe0f\u200d🌈 \U0001d518\U0001d52b 𐍈 € … — “x”
def f(x): return x+1 {} [0]; // == 0x1F 3.14159 2026-01-01 a_b </div> \ufffd ▁ Ġ ##t </w>
"""
PIECES = (*_WORDS.split(), "\n", "\n\n", "\t", "  ", "    ", "\u00a0", "\u3000", " ,", " .")


def corpus_text(random_: random.Random, num_pieces: int) -> str:
    """Return text of this many pieces, most of them with a space between."""
    return "".join(random_.choice(PIECES) + random_.choice((" ", " ", " ", "")) for _ in range(num_pieces))


def _trained(
    model: models.Model, trainer: trainers.Trainer, pre: object, decoder: object, normalizer: object = None
) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    if normalizer is not None:
        inner.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    inner.pre_tokenizer = pre  # pyright: ignore[reportAttributeAccessIssue]
    if decoder is not None:
        inner.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    random_ = random.Random(5)
    inner.train_from_iterator([corpus_text(random_, 40) for _ in range(60)], trainer)
    return inner


def _with_added(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    inner.add_special_tokens(list(SPECIAL))
    inner.add_tokens(list(SHOWN))
    return inner


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2, Qwen, DeepSeek, Llama 3: bytes in disguise."""
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, pre, decoders.ByteLevel())


_FALLBACK = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}


def _byte_fallback_bpe(decoder: object) -> tokenizers.Tokenizer:
    words = (
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
        "e",
        "▁e",
        "の",
        "中",
        "é",
        "п",
        "\u0301",
        "\n",
        "l",
        "o",
        "lo",
        "▁lo",
        "▁▁",
    )
    vocab = _FALLBACK | {word: len(_FALLBACK) + i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁", "e"), ("l", "o"), ("▁", "lo"), ("▁", "▁")]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    return inner


def llama() -> tokenizers.Tokenizer:
    """Llama 2, Mixtral, Phi: `▁` for spaces, single bytes for what the vocabulary lacks, the first space stripped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _byte_fallback_bpe(decoders.Sequence(steps))


def gemma() -> tokenizers.Tokenizer:
    """Gemma: as Llama, nothing stripped."""
    return _byte_fallback_bpe(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def unigram() -> tokenizers.Tokenizer:
    """T5, XLM-R: Unigram with Metaspace."""
    trainer = trainers.UnigramTrainer(show_progress=False, vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"])
    return _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def unigram_bytes() -> tokenizers.Tokenizer:
    """Unigram with byte fallback ahead of Metaspace."""
    vocab = [(token, -9.0) for token in _FALLBACK]
    vocab += [("▁", -2.0), ("▁a", -1.0), ("b", -2.5), ("▁の", -3.0), ("é", -3.0), ("▁e", -2.0), ("n", -2.0)]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return inner


def word_piece() -> tokenizers.Tokenizer:
    """BERT: `##` continues a word."""
    trainer = trainers.WordPieceTrainer(show_progress=False, vocab_size=420, special_tokens=["[UNK]"])
    model = models.WordPiece(unk_token="[UNK]")
    return _trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece("##", cleanup=True))


def bpe_suffix() -> tokenizers.Tokenizer:
    """The first GPT, FSMT: `</w>` ends a word."""
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=420, end_of_word_suffix="</w>", special_tokens=["<unk>"]
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _trained(model, trainer, pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>"))


def word_level() -> tokenizers.Tokenizer:
    """Whole words without a decoder: joined by spaces."""
    trainer = trainers.WordLevelTrainer(show_progress=False, vocab_size=300, special_tokens=["<unk>"])
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.WhitespaceSplit(), None)


def ctc() -> tokenizers.Tokenizer:
    """Wav2Vec2: repeated tokens are one, pads separate them."""
    vocab = {token: i for i, token in enumerate(("<pad>", "|", *"abcdefghijklmnopqrstuvwxyz'.", "é", "の", "n't"))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.CTC("<pad>", "|", cleanup=True)
    return inner


def demo() -> tokenizers.Tokenizer:
    """The tokenizer of the model that comes with the project."""
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


_MAKERS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], bool]] = {
    maker.__name__ + "+cleanup" * cleans_up: (maker, cleans_up)
    for maker, cleans_up in (
        *((maker, False) for maker in (byte_level, llama, gemma, unigram, unigram_bytes, word_piece, bpe_suffix)),
        *((maker, False) for maker in (word_level, ctc, demo)),
        *((maker, True) for maker in (word_piece, unigram, unigram_bytes, word_level)),
    )
}
KINDS = tuple(_MAKERS)


@functools.cache
def inner_of(kind: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of a kind, with special and shown tokens added."""
    return _with_added(_MAKERS[kind][0]())


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return the gateway's tokenizer of a kind."""
    return Tokenizer(inner_of(kind), cleans_up=_MAKERS[kind][1])


def odd_ids(kind: str, random_: random.Random, count: int) -> list[int]:
    """Return ids of any sort: special, shown, unused, single bytes, anything."""
    inner = inner_of(kind)
    size = inner.get_vocab_size()
    hidden = [inner.token_to_id(token) for token in SPECIAL] + [size, size + 7]
    few = random_.sample(range(size), 4)
    choices: Sequence[Callable[[], int]] = (
        lambda: random_.choice(hidden),
        lambda: random_.choice(few),
        lambda: random_.randrange(size),
        lambda: inner.token_to_id(random_.choice(SHOWN)),
    )
    weights = [random_.random() ** 2 for _ in choices]
    return [random_.choices(choices, weights)[0]() for _ in range(count)]


def mixed_ids(kind: str, random_: random.Random) -> list[int]:
    """Return ids of a text with odd ids among them, now and then in long runs."""
    ids: list[int] = []
    for _ in range(random_.randrange(1, 4)):
        if random_.random() < 0.75:
            ids += inner_of(kind).encode(corpus_text(random_, random_.randrange(1, 8)), add_special_tokens=False).ids
        if random_.random() < 0.6:
            ids += odd_ids(kind, random_, random_.choice((1, 2, 3, 12, 90)))
        if random_.random() < 0.3 and ids:
            del ids[random_.randrange(len(ids)) :: random_.randrange(2, 9)]
    return ids
