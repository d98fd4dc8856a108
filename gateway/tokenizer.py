"""The model's tokenizer and chat template, from the files of its checkpoint.

Owns tokenizer.json, and what the files beside it add: special tokens and the template's source. Needs tokenizers and
jinja2, not transformers, and gives what transformers' AutoTokenizer gives. Knows no request; every method is pure and
may run in any thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import tokenizers

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from gateway.answer_text import PromptEnd
from gateway.chat import ChatTemplate
from gateway.cleanup import clean_up
from gateway.decoding import Decoding, is_library_failure
from gateway.pipelines import MODEL_CONFIG, reading_class
from gateway.special_tokens import CONFIG, DeclaredTokens, add_declared, declared_tokens, read_json

# A normalizer may shorten a text before it is cut: three bytes of a wide letter to one, runs of blanks to one blank.
_NORMALIZED_SHARE = 4
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # a code of FLORES-200, by ISO 639-3 and 15924
_NAMED_TEMPLATES = "additional_chat_templates"


class Tokenizer:
    """Text to ids and back."""

    __slots__ = (
        *("_bytes_per_token", "_chat", "_cleans_up", "_decoding", "_end", "_inner", "_special"),
        *("foreign_class", "is_bounded"),
    )

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        chat: ChatTemplate | None = None,
        *,
        special: frozenset[str] | None = None,
        cleans_up: bool = False,
        foreign_class: str = "",
        end: str = "</s>",
    ) -> None:
        """`special`: texts of all special tokens, if others than those of `inner`; `cleans_up`: as transformers'.

        foreign_class: the class of transformers' that would build another pipeline than `inner` has, if one would.
        end: text of the special token that a source ends with.
        """
        self._end = end
        inner.no_truncation()
        inner.no_padding()
        if special is None:
            special = frozenset(t.content for t in inner.get_added_tokens_decoder().values() if t.special)
        self._inner = inner
        self._chat = chat
        self._special = special
        self._decoding = Decoding(inner, special)
        self._cleans_up = cleans_up
        self.foreign_class = foreign_class
        longest = max((len(token.encode()) for token in inner.get_vocab(with_added_tokens=True)), default=1)
        self.is_bounded = _is_bounded(inner)
        self._bytes_per_token = longest * (_NORMALIZED_SHARE if inner.normalizer is not None else 1)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer | None:
        """Read a checkpoint's tokenizer; None if it has no tokenizer.json.

        FailedPrecondition if the files are broken.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:  # tokenizers raises plain Exception, or panics
            if not is_library_failure(error):
                raise
            raise FailedPrecondition(f"{path} cannot be read: {error}", remedy="fetch the checkpoint again") from error
        config = read_json(model_dir / CONFIG)
        reader = reading_class(read_json(model_dir / MODEL_CONFIG), config, path)
        defaults = _padding_token(inner) | reader.tokens
        declared = declared_tokens(model_dir, config, defaults)
        in_file = inner.get_added_tokens_decoder()
        inner = reader.rebuilt(inner, config, path)
        special = add_declared(inner, declared, in_file, is_repeated=reader.repeats_special_tokens)
        inner.encode_special_tokens = config.get("split_special_tokens") is True
        chat = _template(model_dir, config, declared)
        return cls(
            inner,
            chat,
            special=special,
            cleans_up=_cleans_up(inner, config),
            foreign_class=reader.foreign_name,
            end=declared.names.get("eos_token", "</s>"),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat is not None

    @property
    def undefined_names(self) -> Sequence[str]:
        """Names that the chat template uses, nothing defines, and the template does not ask about."""
        return () if self._chat is None else self._chat.undefined_names

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def max_bytes(self, num_tokens: int) -> int:
        """Return how many bytes of UTF-8 a text can have at most that is encoded to so many tokens."""
        return num_tokens * self._bytes_per_token

    def check_template(self) -> None:
        """Render a trivial conversation. FailedPrecondition if the chat template cannot be rendered at all.

        Takes as long, and as much memory, as the template takes.
        """
        if self._chat is not None:
            self._chat.check()

    @property
    def languages(self) -> Sequence[str]:
        """Codes of the languages that are special tokens, such as "eng_Latn"."""
        return sorted(text for text in self._special if _LANGUAGE.fullmatch(text))

    def encode(self, text: str, language: str = "", *, field: str = "text") -> list[int]:
        """Return the ids of a prompt, with the special tokens that the checkpoint's post-processor adds.

        language: one of `languages`; the text then stands between its code and the end token, as NLLB has it. field:
        the request's name of the text, for what is said of one that cannot be encoded.
        """
        if not language:
            return self._encode(text, field=field, add_special_tokens=True)
        around = [self.special_id(language), self.special_id(self._end)]
        code, end = ([] if one is None else [one] for one in around)
        return [*code, *self._encode(text, field=field, add_special_tokens=False), *end]

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, max_bytes: int | None = None) -> list[int]:
        """Return the ids of a conversation of (role, content), rendered by the checkpoint's template.

        max_bytes: a rendered text of more bytes is refused before it is tokenised.
        """
        if self._chat is None:
            raise InvalidArgument(
                "this model has no chat template",
                field="chat",
                remedy="send text or token_ids",
                reason="NO_CHAT_TEMPLATE",
            )
        text = self._chat.render(messages)
        if max_bytes is not None and (size := len(text.encode())) > max_bytes:
            raise InvalidArgument(
                f"the conversation is rendered to {size} bytes, and at most {max_bytes} fit into the model's length",
                field="chat.messages",
                remedy="shorten it",
                reason="PROMPT_TOO_LONG",
            )
        return self._encode(text, field="chat", add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; ids that the tokenizer does not know have no text."""
        text = self._decoding.text(token_ids)
        return clean_up(text) if self._cleans_up else text

    def prompt_end(self, prompt_ids: Sequence[int]) -> PromptEnd:
        """Return where the text of a prompt ends, for the texts of its answers. Work is bounded by a few ids."""
        return PromptEnd(self._decoding, prompt_ids, cleans_up=self._cleans_up)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that has exactly this text; None if there is none."""
        return self._inner.token_to_id(text) if text in self._special else None

    def _encode(self, text: str, *, field: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise InvalidArgument(
                f"the model's tokenizer cannot encode this text: {error}",
                field=field,
                remedy="send token_ids, or other text",
                reason="TOKENIZER",
            ) from None


def _template(model_dir: Path, config: Mapping[str, object], declared: DeclaredTokens) -> ChatTemplate | None:
    try:
        source = _template_source(model_dir, config)
    except (OSError, ValueError) as error:
        return ChatTemplate("", declared.names, fault=f"its file cannot be read: {error}")
    return None if source is None else ChatTemplate(source, declared.names)


def _template_source(model_dir: Path, config: Mapping[str, object]) -> str | None:
    """Return the template of conversations, as AutoTokenizer chooses it among files and names.

    OSError or ValueError if its file cannot be read.
    """
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    folder = model_dir / _NAMED_TEMPLATES
    named = {path.stem: path for path in sorted(folder.glob("*.jinja"))} if folder.is_dir() else {}
    if named:  # files win over the config, even if none of them is the default
        return named["default"].read_text(encoding="utf-8") if "default" in named else None
    source = config.get("chat_template")
    if isinstance(source, list):  # {"name", "template"} each
        entries = [cast("dict[str, object]", e) for e in cast("list[object]", source) if isinstance(e, dict)]
        source = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(source, dict):
        source = cast("dict[object, object]", source).get("default")
    return source if isinstance(source, str) else None


def _padding_token(inner: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Return the padding token that tokenizer.json names, under the name that it has for transformers."""
    padding = cast("dict[str, str] | None", inner.padding)
    return {} if padding is None else {"pad_token": padding["pad_token"]}


def _cleans_up(inner: tokenizers.Tokenizer, config: Mapping[str, object]) -> bool:
    if not config.get("clean_up_tokenization_spaces"):
        return False
    is_forced = bool(config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
    return is_forced or type(inner.model).__name__ != "BPE"


def _is_bounded(inner: tokenizers.Tokenizer) -> bool:
    """Return True if tokenising takes time and memory in proportion to the text, whatever the text.

    Patterns of a checkpoint's own may take time that grows with a power of the text, and replacements may multiply it.
    """
    waiting = [json.loads(part.__getstate__()) for part in (inner.normalizer, inner.pre_tokenizer) if part is not None]
    while waiting:
        step = cast("dict[str, object]", waiting.pop())
        for name in ("normalizers", "pretokenizers"):
            waiting += cast("list[dict[str, object]]", step.get(name) or [])
        pattern = cast("dict[str, str]", step.get("pattern") or {})
        content = cast("str", step.get("content") or "")
        if step.get("type") == "Precompiled" or "Regex" in pattern or len(content) > len(pattern.get("String", " ")):
            return False
    return True
