"""`collegium translate`: a text a line from stdin to stdout, in order.

Owns what is said of lines that fail: an empty line stands for each, and stderr has its number and why.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, BinaryIO

import typer

from collegium.cli import target as t
from collegium.cli.complaint import told
from collegium.client import Translated, TranslateOptions

_SAY_EVERY_S = 2.0
_FIRST_SAY_S = 1.0


def translate(
    target: t.Target = t.DEFAULT_TARGET,
    to: Annotated[
        str, typer.Option("--to", help='Language to translate to, such as "fra_Latn"; empty: the model chooses.')
    ] = "",
    source: Annotated[str, typer.Option("--from", help="Language of the lines; empty: the model's own.")] = "",
    model: Annotated[str, typer.Option("--model", help="Name from `status`; empty: the only one.")] = "",
    n: Annotated[int, typer.Option("--n", "-n", help="Translations of each line, a line each.")] = 1,
    num_beams: t.NumBeams = 1,
    length_penalty: t.LengthPenalty = None,
    early_stopping: t.EarlyStopping = "false",
    no_repeat_ngram_size: t.NoRepeatNgramSize = 0,
    split: Annotated[
        bool, typer.Option("--split", help='Translate each line sentence by sentence; needs the extra "sentences".')
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Most tokens of a translation; with --split, of a sentence.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0: greedy, the default.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Keep tokens up to this probability.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    timeout_s: t.TimeoutS = None,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: t.AsJson = False,
) -> None:
    """Translate the lines of stdin, several at a time, in their order.

    A line that fails leaves an empty one; its number and the reason go to stderr, and the exit status is 1 at the end.
    """
    options: TranslateOptions = {
        "model": model,
        "n": n,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": t.read_early_stopping(early_stopping),
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    progress, num_failed = _Progress(), 0
    with t.open_client(target, api_key, tls, tls_ca, timeout_s) as client:
        options["logprobs"] = json
        for one in client.translate_all(_lines(sys.stdin.buffer), to=to, source=source, split=split, **options):
            if json:
                t.print_json(_as_json(one))
            else:
                for text in [each.text for each in one.translations] or [""] * n:
                    t.print_line(" ".join(text.splitlines()))
            if one.error is not None:
                num_failed += 1
                progress.clear()
                sys.stderr.write(f"line {one.index + 1}: {told(one.error)}\n")
            progress.note(one)
    progress.end(num_failed)
    if num_failed:
        raise typer.Exit(1)


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines without their ends; bytes that are no UTF-8 stay as they are, and fail by themselves."""
    for line in stream:
        yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


class _Progress:
    """Says on stderr how far it is: again and again on one line of a terminal, and once at the end."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._said_s = self._begin_s + _FIRST_SAY_S - _SAY_EVERY_S
        self._num_lines = self._num_tokens = 0
        self._is_terminal = os.isatty(2)
        self._is_shown = False

    def note(self, one: Translated) -> None:
        self._num_lines += 1
        self._num_tokens += sum(len(each.token_ids) for each in one.translations)
        now_s = time.monotonic()
        if self._is_terminal and now_s - self._said_s >= _SAY_EVERY_S:
            self._said_s, self._is_shown = now_s, True
            sys.stderr.write(f"\r\x1b[K{self._told()}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the line back, for another one."""
        if self._is_shown:
            self._is_shown = False
            sys.stderr.write("\r\x1b[K")

    def end(self, num_failed: int) -> None:
        self.clear()
        sys.stderr.write(f"{self._told()}{f', {num_failed} failed' if num_failed else ''}\n")

    def _told(self) -> str:
        took_s = time.monotonic() - self._begin_s
        rate = f"{self._num_tokens / took_s:,.0f} tokens/s"
        lines = "1 line" if self._num_lines == 1 else f"{self._num_lines:,} lines"
        return f"{lines}, {self._num_tokens:,} tokens in {took_s:.1f} s ({rate})"


def _as_json(one: Translated) -> dict[str, t.Json]:
    translations: t.Json = [
        {
            "text": each.text,
            "token_ids": list(each.token_ids),
            "logprob": each.logprob,
            "finish_reason": each.finish_reason,
            "score": each.score,
        }
        for each in one.translations
    ]
    failure = None if one.error is None else told(one.error)
    return {
        "index": one.index,
        "source": one.source,
        "source_tokens": one.source_tokens,
        "translations": translations,
        "error": failure,
    }
