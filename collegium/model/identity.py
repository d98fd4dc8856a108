"""What makes two checkpoints the same: digests of everything that decides an answer, by the name of its part.

Owns the names of the parts, the digests of the small files and the comparison. Equal contents have equal digests
wherever the folder is and whenever it was written. What only says where a file came from is left out of them. Imports
the standard library alone, so that a gateway can ask.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import (
    CONFIG_BYTES,
    TOKENIZER_BYTES,
    has_file,
    read_bytes,
    read_json,
    shown,
)

CONFIG = "config.json"
EXPERTS = "experts"
ARITHMETIC = "expert arithmetic"
ROUTER = "router tensors"
TOKENIZER = "tokenizer"
TOKENIZER_CLASS = "tokenizer class"
TEMPLATE = "chat template"
GENERATION = "generation_config.json"
SHARED = "place of shared experts"
DTYPE = "dtype"
# In the order in which differences are named.
PARTS = (CONFIG, SHARED, EXPERTS, ARITHMETIC, ROUTER, TOKENIZER, TOKENIZER_CLASS, TEMPLATE, GENERATION, DTYPE)

# Fields that say where a file came from, or how it is stored, and change no answer: the type in which weights are
# served is a part of its own.
_PROVENANCE = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map")
_TOKENIZER_FILE = "tokenizer.json"
_OTHER_TOKENIZER_FILES = (  # what a tokenizer is made from if there is no tokenizer.json
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "bpe.codes",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_TOKENIZER_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_sources(model_dir: Path) -> dict[str, str]:
    """Take the digests of a checkpoint's small files, by part. Raises CheckpointError as read_json does."""
    generation = model_dir / GENERATION
    return {
        CONFIG: _digest_of_json(read_json(model_dir / CONFIG)),
        GENERATION: _digest_of_json(read_json(generation)) if has_file(generation) else "",
    } | read_text_sources(model_dir)


def read_text_sources(model_dir: Path) -> dict[str, str]:
    """Take the digests of what turns text into ids, which is all that a gateway reads: tokenizer, its class and
    chat template.

    A part without any file is "". Raises CheckpointError as read_json does.
    """
    found: list[tuple[str, str]] = []
    for name in (_TOKENIZER_FILE,) if has_file(model_dir / _TOKENIZER_FILE) else _OTHER_TOKENIZER_FILES:
        if has_file(model_dir / name):
            data = read_bytes(model_dir / name, limit_bytes=TOKENIZER_BYTES)
            found.append((name, hashlib.blake2b(data, digest_size=16).hexdigest()))
    template: object = ""
    for name in _TOKENIZER_JSON_FILES:
        if has_file(model_dir / name):
            fields = read_json(model_dir / name, limit_bytes=TOKENIZER_BYTES)
            template = fields.pop("chat_template", template)
            found.append((name, _digest_of_json(fields)))
    for file in (model_dir / "additional_chat_templates" / "default.jinja", model_dir / "chat_template.jinja"):
        if has_file(file):  # as the gateway chooses
            template = read_bytes(file, limit_bytes=CONFIG_BYTES).decode("utf-8", "replace")
    config = read_json(model_dir / CONFIG) if found and has_file(model_dir / CONFIG) else {}
    return {
        TOKENIZER: digest_of(found) if found else "",
        # What AutoTokenizer chooses its class by, beside the tokenizer's own files: the class decides what they do.
        TOKENIZER_CLASS: digest_of([config.get("model_type"), config.get("tokenizer_class")]) if config else "",
        TEMPLATE: digest_of(template) if template else "",
    }


def digest_of(value: object) -> str:
    """Take the digest of a JSON value: 32 hexadecimal digits; the order of an object's fields does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Name the parts that two checkpoints do not share, in the order of PARTS. Parts that one side lacks differ."""
    names = [*PARTS, *sorted((set(ours) | set(theirs)) - set(PARTS))]
    return [shown(name) for name in names if ours.get(name, "") != theirs.get(name, "")]


def tell_differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Write what differs for a message, such as "config.json and tokenizer differ"; "" if nothing does."""
    names = differences(ours, theirs)[: len(PARTS)]
    if DTYPE in names:  # this part is a word, not a digest
        names[names.index(DTYPE)] = f"{DTYPE} ({shown(ours.get(DTYPE))} and {shown(theirs.get(DTYPE))})"
    if len(names) < 2:
        return "".join(f"{name} differs" for name in names)
    return f"{', '.join(names[:-1])} and {names[-1]} differ"


def _digest_of_json(fields: Mapping[str, object]) -> str:
    return digest_of({name: _plain(value) for name, value in fields.items() if name not in _PROVENANCE})


def _plain(value: object) -> object:
    """Write numbers in one way: 10000.0 is 10000."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in cast("list[object]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value
