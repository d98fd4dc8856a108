"""Special tokens that a checkpoint declares beside its tokenizer.json.

Owns the rules by which transformers' AutoTokenizer reads tokenizer_config.json, special_tokens_map.json and
added_tokens.json: which tokens are added to the tokenizer, in which order, and under which names templates know them.
Source: transformers 5.23, PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
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
_TYPE = "AddedToken"
_OWN = "model_specific_special_tokens"
_NO_DEFAULTS: Mapping[str, str | None] = MappingProxyType({})
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


def declared_tokens(
    model_dir: Path, config: Mapping[str, object], defaults: Mapping[str, str | None] = _NO_DEFAULTS
) -> DeclaredTokens:
    """Read the files beside tokenizer.json; `config` is what tokenizer_config.json holds.

    defaults: standard names that have a token if the files do not mention them. A token's fields without
    `"__type": "AddedToken"` are a token only where transformers takes them for one, or else fails.
    FailedPrecondition if one of the files is broken.
    """
    settings = dict(config)
    if not settings.get(_EXTRA) and _EXTRA_BEFORE_5 in settings:
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE_5)
    by_name = _take_names(settings, model_dir / CONFIG)
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        found = DeclaredTokens(is_list_complete=True)
        path = model_dir / CONFIG
        for token_id, raw in cast("dict[str, object]", listed).items():
            found.by_id[_id(token_id, path)] = _token(raw, path, "added_tokens_decoder")
        _read_names(settings, by_name, found, path, defaults)
        return found
    # As written before transformers 4.34: two more files, the first of which wins over the config.
    found = DeclaredTokens(is_list_complete=False)
    special_map = _special_map(model_dir / SPECIAL_MAP, settings.get(_EXTRA))
    settings |= special_map
    if isinstance(settings.get(_EXTRA), dict):
        by_name |= _taken_names(settings, _EXTRA, model_dir / SPECIAL_MAP)
    special = {value for name in STANDARD_NAMES if isinstance(value := settings.get(name), str)}
    extra = cast("list[object]", settings.get(_EXTRA) or ())
    special |= {_content(value) for value in extra if isinstance(value, str | _AddedToken)}
    if _EXTRA not in settings:
        settings[_EXTRA] = settings.get(_EXTRA_BEFORE_5)
    _read_names(settings, by_name, found, model_dir / CONFIG, defaults)
    special |= {_content(found.named[name]) for name in STANDARD_NAMES if name in special_map and name in found.named}
    for content, token_id in read_json(model_dir / ADDED).items():
        token = _AddedToken(content, normalized=content not in special, special=content in special)
        found.by_id[_id(token_id, model_dir / ADDED)] = token
    return found


def add_declared(
    inner: tokenizers.Tokenizer,
    declared: DeclaredTokens,
    in_file: Mapping[int, _AddedToken],
    *,
    is_repeated: bool = False,
) -> frozenset[str]:
    """Add the declared tokens to a tokenizer, which it mutates; return the texts of all that are special now.

    in_file: the added tokens of tokenizer.json, which `inner` may lack. is_repeated: add the special ones once more, as
    plain special tokens.
    """
    known = inner.get_added_tokens_decoder().values()
    # A token stays special for the library once it was, whatever is declared later.
    special = {token.content for token in known if token.special}
    by_id = declared.by_id if declared.is_list_complete else declared.by_id | in_file
    listed = [by_id[token_id] for token_id in sorted(by_id)]
    contents = {token.content for token in (*known, *listed)}
    named_or_extra = [*declared.named.values(), *declared.extra]
    others: list[_AddedToken | str] = []
    for token in named_or_extra:
        if _content(token) not in contents and token not in others:
            others.append(token)
    adding = listed + [_AddedToken(t, special=True) if isinstance(t, str) else t for t in others]
    names = set(declared.names.values())
    for token in adding:
        token.special = token.special or token.content in names
    inner.add_tokens(adding)
    if is_repeated:
        again = [_AddedToken(_content(token), special=True) for token in named_or_extra]
        inner.add_tokens(again)
        adding += again
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
    """Read special_tokens_map.json, in which a token's fields are a token, with or without "__type"."""
    found = read_json(path)
    for name, value in found.items():
        if isinstance(value, dict) and name != _EXTRA:
            found[name] = {**cast("dict[str, object]", value), "special": True, "__type": _TYPE}
        elif isinstance(value, list) and name == _EXTRA:
            listed = [_special(one, path) if isinstance(one, dict) else one for one in cast("list[object]", value)]
            found[name] = [*(cast("list[object]", extra) if isinstance(extra, list) else ()), *listed]
    return found


def _special(fields: object, path: Path) -> _AddedToken:
    return _token({**cast("dict[str, object]", fields), "special": True}, path, _EXTRA)


def _take_names(settings: dict[str, object], path: Path) -> dict[str, object]:
    """Take tokens of this model alone out of the settings: texts whose key ends in `_token`, and named extra ones.

    Only if there are none of either kind, those under `model_specific_special_tokens` count.
    """
    own = [name for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)]
    found: dict[str, object] = {name: settings.pop(name) for name in own if name not in STANDARD_NAMES}
    if isinstance(settings.get(_EXTRA), dict):
        found |= _taken_names(settings, _EXTRA, path)
    return found or _taken_names(settings, _OWN, path)


def _taken_names(settings: dict[str, object], key: str, path: Path) -> dict[str, object]:
    value = settings.pop(key, None)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _broken(path, f"{key} is {str(value)[:80]!r} instead of names and their tokens")
    return cast("dict[str, object]", value)


def _read_names(
    settings: Mapping[str, object],
    by_name: Mapping[str, object],
    found: DeclaredTokens,
    path: Path,
    defaults: Mapping[str, str | None],
) -> None:
    """Read named tokens in the order in which transformers adds them, as the order decides the ids of new ones."""
    for name in (*STANDARD_NAMES, *(name for name in settings if name not in STANDARD_NAMES)):
        value = settings[name] if name in settings else defaults.get(name)
        if value is None or not name.endswith("_token"):
            continue
        if isinstance(value, str):
            found.named[name] = value
        elif name in STANDARD_NAMES or _is_typed(value):
            found.named[name] = _token(value, path, name)
    for name, value in by_name.items():
        found.named[name] = value if isinstance(value, str) else _token(value, path, name)
    extra = settings.get(_EXTRA)
    if isinstance(extra, list):
        values = cast("list[object]", extra)
        found.extra = [
            value if isinstance(value, str | _AddedToken) else _token(value, path, _EXTRA) for value in values
        ]


def _is_typed(value: object) -> bool:
    return isinstance(value, dict) and cast("dict[str, object]", value).get("__type") == _TYPE


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
