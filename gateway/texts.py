"""Token ids of prompts, made so that no prompt and no template holds the gateway up.

Owns where the work is done: a short text is tokenised at once on the event loop, in about a millisecond; longer texts,
all conversations, and what a checkpoint's own patterns cut go to processes of their own (text_process.py), which can be
ended. Knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.requests import Prompt
from gateway.text_process import TextProcess
from gateway.tokenizer import Tokenizer

_SMALL_CHARS = 4096
# Longer jobs have a process of their own, so that a conversation never waits behind a book.
_LONG_CHARS = 65_536


class Texts:
    """Makes ids of prompts; owned by the event loop. `short` and `long` are needed where there is a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, short: TextProcess, long: TextProcess) -> None:
        self._tokenizer = tokenizer
        self._short, self._long = short, long

    @property
    def num_refusals(self) -> int:
        """Prompts given up because they took more time or memory than one may."""
        return self._short.num_refusals + self._long.num_refusals

    async def ids_of(self, prompt: Prompt, *, max_tokens: int) -> Sequence[int]:
        """Return a prompt's token ids. Raises InvalidArgument if they can't be made, in time or at all;
        FailedPrecondition if no conversation can be, because the checkpoint's chat template is broken.

        max_tokens: a text that surely has more is refused before it is tokenised.
        """
        if prompt.field in ("token_ids", "target_ids") or self._tokenizer is None:
            return prompt.token_ids
        if not prompt.turns and len(prompt.text) <= _SMALL_CHARS and self._tokenizer.is_bounded:
            return self._tokenizer.encode(prompt.text, prompt.language, field=prompt.field)
        num_chars = len(prompt.text) + sum(len(role) + len(content) for role, content in prompt.turns)
        process = self._short if num_chars <= _LONG_CHARS else self._long
        return await process.encode(
            prompt.field,
            text=prompt.text,
            turns=prompt.turns,
            max_bytes=self._tokenizer.max_bytes(max_tokens),
            language=prompt.language,
        )
