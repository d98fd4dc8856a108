"""Special tokens that a checkpoint declares beside its tokenizer.json.

Owns the rules by which transformers' AutoTokenizer reads tokenizer_config.json, special_tokens_map.json and
added_tokens.json: which tokens are added to the tokenizer, in which order, and under which names templates know them.
Source: transformers 5.23, PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import tokenizers

from collegium.fabric.errors import FailedPrecondition
from collegium.model import checkpoint_files

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
# Names that every tokenizer has; any other key that ends in `_token` names a token of this model alone.
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = "extra_special_tokens"
_EXTRA_BEFORE_5 = "additional_special_tokens"
_AddedToken = tokenizers.AddedToken


@dataclass(slots=True)
class DeclaredTokens:
    """What the files declare: tokens by id, by name, and those that are just special.

    is_list_complete: by_id is tokenizer_config.json's own list, so that tokenizer.json's tokens keep what it says.
    """

    is_list_complete: bool
    by_id: dict[int, _AddedToken] = field(default_factory=dict[int, _AddedToken])
    named: dict[str, _AddedToken | str] = field(default_factory=dict[str, "_AddedToken | str"])
    extra: list[_AddedToken | str] = field(default_factory=list["_AddedToken | str"])

    @property
    def names(self) -> dict[str, str]:
        """Texts of the named tokens, as templates get them."""
        return {name: _content(token) for name, token in self.named.items()}


def declared_tokens(model_dir: Path, config: Mapping[str, object]) -> DeclaredTokens:
    """Read the files beside tokenizer.json; `config` is what tokenizer_config.json holds.

    FailedPrecondition if one of the files is broken.
    """
    settings = dict(config)
    if not settings.get(_EXTRA) and _EXTRA_BEFORE_5 in settings:
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE_5)
    by_name = _take_names(settings)
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        found = DeclaredTokens(is_list_complete=True)
        path = model_dir / CONFIG
        for token_id, raw in cast("dict[str, object]", listed).items():
            found.by_id[_id(token_id, path)] = _token(raw, path, "added_tokens_decoder")
        _read_names(settings, by_name, found, path)
        return found
    # As written before transformers 4.34: two more files, the first of which wins over the config.
    found = DeclaredTokens(is_list_complete=False)
    special_map = _special_map(model_dir / SPECIAL_MAP, settings.get(_EXTRA))
    settings |= special_map
    by_name |= _take_extra_names(settings)
    special = {value for name in STANDARD_NAMES if isinstance(value := settings.get(name), str)}
    special |= {value for value in cast("list[object]", settings.get(_EXTRA) or ()) if isinstance(value, str)}
    if _EXTRA not in settings:
        settings[_EXTRA] = settings.get(_EXTRA_BEFORE_5)
    _read_names(settings, by_name, found, model_dir / CONFIG)
    special |= {_content(found.named[name]) for name in STANDARD_NAMES if name in special_map and name in found.named}
    for content, token_id in read_json(model_dir / ADDED).items():
        token = _AddedToken(content, normalized=content not in special, special=content in special)
        found.by_id[_id(token_id, model_dir / ADDED)] = token
    return found


def add_declared(inner: tokenizers.Tokenizer, declared: DeclaredTokens) -> frozenset[str]:
    """Add the declared tokens to a tokenizer, which it mutates; return the texts of all that are special now."""
    known = inner.get_added_tokens_decoder()
    # A token stays special for the library once it was, whatever is declared later.
    special = {token.content for token in known.values() if token.special}
    by_id = declared.by_id if declared.is_list_complete else declared.by_id | known
    listed = [by_id[token_id] for token_id in sorted(by_id)]
    contents = {token.content for token in (*known.values(), *listed)}
    others: list[_AddedToken | str] = []
    for token in (*declared.named.values(), *declared.extra):
        if _content(token) not in contents and token not in others:
            others.append(token)
    adding = listed + [_AddedToken(t, special=True) if isinstance(t, str) else t for t in others]
    names = set(declared.names.values())
    for token in adding:
        token.special = token.special or token.content in names
    inner.add_tokens(adding)
    return frozenset(special | {token.content for token in adding if token.special})


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; an empty one if there is no such file. FailedPrecondition if it is broken."""
    if not checkpoint_files.has_file(path):
        return {}
    try:
        return dict(checkpoint_files.read_json(path, limit_bytes=checkpoint_files.TOKENIZER_BYTES))
    except checkpoint_files.CheckpointError as error:
        raise FailedPrecondition(str(error), remedy="fetch the checkpoint again") from error


def _special_map(path: Path, extra: object) -> dict[str, object]:
    found = read_json(path)
    for name, value in found.items():
        if isinstance(value, dict) and name != _EXTRA:
            found[name] = {**cast("dict[str, object]", value), "special": True}
        elif name == _EXTRA and isinstance(value, list) and isinstance(extra, list):
            found[name] = [*cast("list[object]", extra), *cast("list[object]", value)]
    return found


def _take_names(settings: dict[str, object]) -> dict[str, object]:
    """Take tokens of this model alone out of the settings: texts whose key ends in `_token`, and named extra ones."""
    own = [name for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)]
    found: dict[str, object] = {name: settings.pop(name) for name in own if name not in STANDARD_NAMES}
    return found | _take_extra_names(settings)


def _take_extra_names(settings: dict[str, object]) -> dict[str, object]:
    extra = settings.get(_EXTRA)
    if not isinstance(extra, dict):
        return {}
    del settings[_EXTRA]
    return cast("dict[str, object]", extra)


def _read_names(
    settings: Mapping[str, object], by_name: Mapping[str, object], found: DeclaredTokens, path: Path
) -> None:
    """Read named tokens in the order in which transformers adds them, as the order decides the ids of new ones."""
    for name in (*STANDARD_NAMES, *(name for name in settings if name not in STANDARD_NAMES)):
        value = settings.get(name)
        if value is None or not name.endswith("_token"):
            continue
        if isinstance(value, str | dict):
            found.named[name] = value if isinstance(value, str) else _token(cast("object", value), path, name)
        elif name in STANDARD_NAMES:
            raise _broken(path, f"{name} is {str(value)[:80]!r} instead of a token")
    for name, value in by_name.items():
        found.named[name] = value if isinstance(value, str) else _token(value, path, f"{_EXTRA}.{name}")
    extra = settings.get(_EXTRA)
    if isinstance(extra, list):
        values = cast("list[object]", extra)
        found.extra = [value if isinstance(value, str) else _token(value, path, _EXTRA) for value in values]


def _token(raw: object, path: Path, where: str) -> _AddedToken:
    try:
        if isinstance(raw, str):
            return _AddedToken(raw, special=True)
        fields = dict(cast("dict[str, object]", raw))
        content = fields.pop("content")
        fields.pop("__type", None)
        return _AddedToken(content, **fields)  # pyright: ignore[reportArgumentType]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"{where} holds {str(raw)[:80]!r}, which is no token: {error}") from error


def _id(raw: object, path: Path) -> int:
    try:
        return int(cast("str", raw))
    except (TypeError, ValueError):
        raise _broken(path, f"{str(raw)[:80]!r} is no token id") from None


def _content(token: _AddedToken | str) -> str:
    return token if isinstance(token, str) else token.content


def _broken(path: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(f"{path} cannot be used: {what}", remedy="fetch the checkpoint again")
