"""Texts of several sentences on their way through a translate call: cut into sentences, and put together again.

Owns what lies between the sentences of a text, which its translation keeps: blanks and line ends. Where a sentence ends
is decided by sentencex (Wikimedia), which rather leaves two together than cuts one. Sends nothing.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from collegium.client.results import FinishReason, Translated, Translation
from collegium.fabric.errors import FailedPrecondition, InvalidArgument

# sentencex names languages by two letters, models of the NLLB kind by three; of others it has no rules of their own.
_CODES = """
amh:am arb:ar ben:bn bul:bg cat:ca dan:da deu:de ell:el eng:en fin:fi fra:fr guj:gu hin:hi hye:hy ita:it jpn:ja kan:kn
kaz:kk mal:ml mar:mr mya:my nld:nl pan:pa pol:pl por:pt rus:ru slk:sk spa:es tam:ta tel:te zho:zh
"""
_TWO_LETTERS = {long: short for long, _, short in (pair.partition(":") for pair in _CODES.split())}


@dataclass(slots=True)
class _Passage:
    """A text under way. gaps: what stands before each of its sentences, and after the last one."""

    text: str
    gaps: list[str]
    found: list[Translated] = field(default_factory=list[Translated])


class Passages:
    """One call's texts. May be called from two threads: one cuts, the other joins."""

    def __init__(self, language: str, num_choices: int) -> None:
        """language: of the texts, a model's code; empty: cut as English is.

        Raises FailedPrecondition without sentencex, InvalidArgument for several translations of a text: which ones of
        its sentences would make one?
        """
        if num_choices > 1:
            raise InvalidArgument(
                f"a text that is split has one translation, not {num_choices}", field="n", remedy="leave it out"
            )
        self._segment = _segmenter()
        code = language.partition("_")[0]
        self._language = _TWO_LETTERS.get(code, code) or "en"
        self._under_way: deque[_Passage] = deque()
        self._num_joined = 0

    def cut(self, text: str) -> Sequence[str]:
        """Give the sentences of the next text, one at least."""
        sentences: list[str] = []
        gaps: list[list[str]] = [[]]
        for piece in self._pieces(text):
            inner = piece.strip()
            if not inner:
                gaps[-1].append(piece)
                continue
            before, _, after = piece.partition(inner)
            gaps[-1].append(before)
            sentences.append(inner)
            gaps.append([after])
        joined = ["".join(parts) for parts in gaps]
        self._under_way.append(_Passage(text, joined if sentences else [text, ""]))
        return sentences or [""]

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a text. What cannot be cut stays whole: no UTF-8, to be refused as it is, and what sentencex fails at.

        The pieces together are the text: what sentencex leaves out, which it does of long ones, stands between them.
        """
        try:
            found = self._segment(self._language, text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # it panics at some blanks, and a panic is no Exception
            found = [text]
        at = 0
        for piece in found:
            begin = text.find(piece, at)
            if begin < 0:
                break
            if begin > at:
                yield text[at:begin]
            yield piece
            at = begin + len(piece)
        if at < len(text):
            yield text[at:]

    def cut_all(self, texts: Iterable[str]) -> Iterator[str]:
        """Give the sentences of all texts."""
        for text in texts:
            yield from self.cut(text)

    async def cut_each(self, texts: Iterable[str] | AsyncIterable[str]) -> AsyncIterator[str]:
        """Give the sentences of all texts, as these come."""
        if isinstance(texts, AsyncIterable):
            async for text in texts:
                for sentence in self.cut(text):
                    yield sentence
        else:
            for sentence in self.cut_all(texts):
                yield sentence

    def join(self, found: Translated) -> Translated | None:
        """Take the next sentence's translation; gives the text's, once it is the last one of a text."""
        passage = self._under_way[0]
        passage.found.append(found)
        if len(passage.found) < len(passage.gaps) - 1:
            return None
        self._under_way.popleft()
        self._num_joined += 1
        return _joined(passage, self._num_joined - 1)


def _joined(passage: _Passage, index: int) -> Translated:
    failed = next((one for one in passage.found if one.error is not None), None)
    parts = [one.translations[0] for one in passage.found if one.translations]
    whole: tuple[Translation, ...] = ()
    if failed is None:
        text = passage.gaps[0] + "".join(part.text + gap for part, gap in zip(parts, passage.gaps[1:], strict=True))
        logprobs = [part.logprob for part in parts if part.logprob is not None]
        whole = (
            Translation(
                text=text,
                token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
                logprob=sum(logprobs) if len(logprobs) == len(parts) else None,
                finish_reason=_finish(parts),
                score=parts[0].score if len(parts) == 1 else None,  # those of several add up to none
            ),
        )
    return Translated(
        index=index,
        source=passage.text,
        translations=whole,
        source_tokens=sum(one.source_tokens for one in passage.found),
        error=None if failed is None else failed.error,
    )


def _finish(parts: Sequence[Translation]) -> FinishReason | None:
    """Why the text ended: as one that was cut, if there is one, else as the last."""
    return "length" if any(part.finish_reason == "length" for part in parts) else parts[-1].finish_reason


def _segmenter() -> Callable[[str, str], Sequence[str]]:
    try:
        segment: Callable[[str, str], Sequence[str]] = importlib.import_module("sentencex").segment
    except ImportError:
        raise FailedPrecondition(
            "texts are split by the package sentencex, which is not there",
            reason="NO_SENTENCES",
            remedy="run pip install '.[sentences]' in a checkout of the project",
        ) from None
    return segment
