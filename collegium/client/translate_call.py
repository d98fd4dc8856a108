"""One translate call as a state machine: what to send, what is still to be answered, and where a broken stream goes on.

Owns the sentences that were sent and not answered yet, which are sent again on another stream. Sends nothing; Client
and AsyncClient both drive it. Answers come in the order of the sentences.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Literal, TypedDict, cast

from collegium.client.options import GenerateOptions, beam_search_of, sampling_of, stopping_of, uint
from collegium.client.results import Translated, read_translated
from collegium.fabric.errors import Internal, InvalidArgument, Unavailable
from collegium.v1 import inference_pb2 as pb

MOST_UNDER_WAY = 128  # sentences; no more are taken from the caller before the first of them is answered


class TranslateOptions(TypedDict, total=False):
    """Keywords of translate and translate_all, beside the languages. Absent or None: the default."""

    model: str  # name from list_models; empty: the only model
    n: int  # number of translations
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
    )


class TranslateCall:
    """The call's memory. `sent` and `absorb` may be called from two threads."""

    def __init__(self, options: pb.TranslateOptions) -> None:
        self._options = options
        self._unanswered: deque[bytes] = deque()
        self._num_answered = 0
        self._first_of_stream = 0
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

    def begin(self) -> list[pb.TranslateRequest]:
        """What a new stream begins with: the options, and what was sent on an earlier one and not answered."""
        with self._lock:
            self._first_of_stream = self._num_answered
            again = [pb.TranslateRequest(text=text) for text in self._unanswered]
        return [pb.TranslateRequest(options=self._options), *again]

    def send(self, text: str) -> pb.TranslateRequest:
        """Write the next sentence down. What is no UTF-8 is sent as it is, for the gateway to refuse it alone."""
        raw = _bytes_of(text)
        with self._lock:
            self._unanswered.append(raw)
        return pb.TranslateRequest(text=raw)

    def absorb(self, response: pb.TranslateResponse) -> Translated:
        """Take an answer."""
        with self._lock:
            index = self._first_of_stream + response.index
            if index != self._num_answered or not self._unanswered:
                raise Internal(f"sentence {index} is answered, not {self._num_answered}", reason="STREAM_GAP")
            source = self._unanswered.popleft()
            self._num_answered += 1
        return read_translated(response, index, source.decode("utf-8", "replace"))

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
