"""How an error is told at a terminal: flags instead of a message's fields, and what to try.

Pure: an error in, its text out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from collegium.fabric.errors import CollegiumError, Unavailable

_SAME_NAME = (
    *("prompt", "prompt_ids", "model", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos", "stop", "stop_ids"),
    *("n", "logprobs", "request_id", "timeout_s", "target", "target_text", "target_ids"),
)
# The flag behind each field of a message, and behind each keyword of the SDK.
_FLAGS: Mapping[str, str] = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAME} | {
    "num_choices": "--n",
    "num_logprobs": "--logprobs",
    "stop_strings": "--stop",
    "text": "--prompt",
    "input": "--prompt",
    "token_ids": "--prompt-ids",
    "chat": "--message",
    "messages": "--message",
}
# Names that mean nothing else in a sentence.
_IN_TEXT = re.compile(rf"(?<![\w.-])({'|'.join(name for name in _FLAGS if '_' in name)})(?!\w)")
_FORMS = re.compile(r"\b(one of) (?:prompt|text)\b(.* and) (?:messages|chat)$")
_KEY_FIELD = "authorization"


def told(error: CollegiumError) -> str:
    """Write an error as one line for who typed the command."""
    return f"{error.code.name}: {_with_flags(error)}{_hint(error)}"


def _with_flags(error: CollegiumError) -> str:
    if not error.field:
        return error.message
    text = error.message.removeprefix(f"{error.field}: ")
    if error.field == _KEY_FIELD:
        why = text.removesuffix(f"; {error.remedy}")
        return f"{why}; give --api-key KEY, or set COLLEGIUM_API_KEY"
    name = error.field.removeprefix("sampling.").removeprefix("stopping.")
    flag = _FLAGS.get(re.split(r"[.\[ ]", name)[0])
    if flag is None:
        return error.message
    text = _FORMS.sub(r"\1 --prompt\2 --message", _IN_TEXT.sub(lambda match: _FLAGS[match[1]], text))
    return text if text.startswith(flag) else f"{flag}: {text}"


def _hint(error: CollegiumError) -> str:
    if not isinstance(error, Unavailable) or error.field:
        return ""
    if "CERTIFICATE_VERIFY_FAILED" in error.message:
        return "; the gateway's certificate is not trusted: give --tls-ca FILE"
    if "WRONG_VERSION_NUMBER" in error.message or "handshake" in error.message.lower():
        return "; the gateway may not speak TLS: leave --tls and --tls-ca out"
    if "Socket closed" in error.message:
        return "; the gateway may speak TLS: give --tls, or --tls-ca FILE"
    return "; is a gateway at --target?"
