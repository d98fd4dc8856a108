"""One translate call as a state machine: what to send, what is still to be answered, and where a broken stream goes on.

Owns the sentences that were sent and not answered yet, which are sent again on another stream. Sends nothing; Client
and AsyncClient both drive it. Answers come in the order of the sentences.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, cast

from collegium.client.options import GenerateOptions, beam_search_of, sampling_of, stopping_of, uint
from collegium.client.results import Translated, read_translated
from collegium.fabric.errors import CollegiumError, Internal, InvalidArgument, Unavailable
from collegium.v1 import inference_pb2 as pb

_MOST_BYTES = 1 << 20  # far beyond any model's length, and below what a gateway takes as one message
_STAND_IN = b"\xff"  # which every gateway refuses alone
MOST_UNDER_WAY = 128  # sentences; no more are taken from the caller before the first of them is answered


class TranslateOptions(TypedDict, total=False):
    """Keywords of translate and translate_all, beside the languages. Absent or None: the default."""

    model: str  # name from list_models; empty: the only model
    n: int  # number of translations
    logprobs: bool  # tell the log-probability of each; a search by beams does anyway
    num_beams: int  # as in GenerateOptions, as all below
    length_penalty: float | None
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int
    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None  # None: each sentence has its own


_KEYWORDS = frozenset(TranslateOptions.__annotations__)


def translate_options(to: str, source: str, options: TranslateOptions) -> pb.TranslateOptions:
    """Write down how sentences are translated. InvalidArgument for values that no request can carry."""
    if unknown := sorted(set(options) - _KEYWORDS):
        raise TypeError(f"translate has no option {unknown[0]!r}; it has {', '.join(sorted(_KEYWORDS))}")
    num_choices = uint("n", options.get("n", 1))
    if num_choices == 0:
        raise InvalidArgument("0 translations are no answer", field="n", remedy="give at least 1")
    like = cast(GenerateOptions, options)
    return pb.TranslateOptions(
        model=options.get("model", ""),
        source_language=source,
        target_language=to,
        sampling=sampling_of(like),
        stopping=stopping_of(like),
        num_choices=num_choices,
        beam_search=beam_search_of(like),
        logprobs=options.get("logprobs", False),
    )


@dataclass(frozen=True, slots=True)
class _Sent:
    """A sentence that is not answered yet; error: what it fails by at home, where a stand-in is sent for it."""

    raw: bytes
    error: CollegiumError | None = None

    @property
    def request(self) -> pb.TranslateRequest:
        return pb.TranslateRequest(text=self.raw if self.error is None else _STAND_IN)


class TranslateCall:
    """The call's memory. May be called from two threads: one sends, the other takes answers.

    Streams have numbers: a sentence is written down for the newest one alone, so that what an earlier one had taken
    from the caller when it broke goes into the next.
    """

    def __init__(self, options: pb.TranslateOptions) -> None:
        self._options = options
        self._unanswered: deque[_Sent] = deque()
        self._num_answered = self._first_of_stream = self._stream = 0
        self._lock = threading.Lock()
        self.has_all = False  # of the caller's sentences

    @property
    def is_complete(self) -> bool:
        """Whether everything is answered that there is."""
        return self.has_all and not self._unanswered

    @property
    def has_room(self) -> bool:
        """Whether another sentence may be sent."""
        return len(self._unanswered) < MOST_UNDER_WAY

    def begin(self) -> tuple[int, list[pb.TranslateRequest]]:
        """Open a stream: its number, and what it begins with: the options, and what was not answered before."""
        with self._lock:
            self._stream += 1
            self._first_of_stream = self._num_answered
            return self._stream, [
                pb.TranslateRequest(options=self._options),
                *(one.request for one in self._unanswered),
            ]

    def is_current(self, stream: int) -> bool:
        """Whether no later stream has been opened."""
        return stream == self._stream

    def send(self, text: str, stream: int) -> pb.TranslateRequest | None:
        """Write the next sentence down; None where a later stream has been opened, which is to send it.

        What is no UTF-8 is sent as it is, for the gateway to refuse it alone.
        """
        raw = _bytes_of(text)
        error: CollegiumError | None = None
        if len(raw) > _MOST_BYTES:
            error = InvalidArgument(
                f"the text has {len(raw):,} bytes; a sentence may have {_MOST_BYTES:,}",
                field="text",
                remedy="translate it in parts, such as sentences",
                reason="PROMPT_TOO_LONG",
            )
        with self._lock:
            if stream != self._stream:
                return None
            self._unanswered.append(_Sent(raw, error))
            return self._unanswered[-1].request

    def absorb(self, response: pb.TranslateResponse) -> Translated:
        """Take an answer."""
        with self._lock:
            index = self._first_of_stream + response.index
            if index != self._num_answered or not self._unanswered:
                raise Internal(f"sentence {index} is answered, not {self._num_answered}", reason="STREAM_GAP")
            sent = self._unanswered.popleft()
            self._num_answered += 1
        found = read_translated(response, index, sent.raw.decode("utf-8", "replace"))
        return found if sent.error is None else replace(found, error=sent.error)

    def end_stream(self) -> None:
        """Note that the stream ended well; Unavailable where answers are missing."""
        if not self.is_complete:
            raise Unavailable("the stream ended before its last answer", reason="STREAM_CUT")


def _bytes_of(text: str) -> bytes:
    for errors in ("strict", "surrogateescape", "surrogatepass"):
        try:
            return text.encode("utf-8", errors)
        except UnicodeEncodeError:
            continue
    raise AssertionError("surrogatepass refuses nothing")
