"""Check what a gateway sends before the engine sees it: every field of a frame, in the bounds that gateways keep.

Owns the bounds. Pure. A gateway validates what its callers send, but its frames are a peer's input all the same: a
value out of bounds would cost the other sequences of the step their answers. A wrong submission is refused alone; a
frame whose own fields are out of bounds ends its stream.
"""

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from collegium.fabric.errors import InvalidArgument
from collegium.model.sampling import SamplingParams
from collegium.v1 import inference_pb2, router_pb2
from router_svc.beams import BeamOptions, EarlyStopping

MAX_REQUEST_ID_CHARS = 256  # 128 of the caller's, then the gateway's suffix that makes it unique
MAX_GATEWAY_ID_CHARS = 128
MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOP_IDS = 256
MAX_BEAMS = 32
MAX_NGRAM = 64
MAX_LENGTH_PENALTY = 10.0
MAX_FRAME_ITEMS = 65_536  # of each list of a frame
_EARLY_STOPPING: Mapping[int, EarlyStopping] = {
    inference_pb2.EARLY_STOPPING_UNSPECIFIED: False,
    inference_pb2.EARLY_STOPPING_ALWAYS: True,
    inference_pb2.EARLY_STOPPING_NEVER: "never",
}
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def check_frame(frame: router_pb2.AttachRequest) -> None:
    """Check what a frame has beside its submissions. Raises InvalidArgument that names the field."""
    if len(frame.gateway_id) > MAX_GATEWAY_ID_CHARS or not _is_plain(frame.gateway_id):
        raise InvalidArgument(
            f"gateway_id has {len(frame.gateway_id)} characters; it must be printable ASCII, at most "
            f"{MAX_GATEWAY_ID_CHARS} characters",
            field="gateway_id",
            reason="INVALID_FRAME",
        )
    for name, items in (
        ("submissions", frame.submissions),
        ("cancellations", frame.cancellations),
        ("pauses", frame.pauses),
        ("unpauses", frame.unpauses),
    ):
        if len(items) > MAX_FRAME_ITEMS:
            message = f"{name} has {len(items)} entries; the maximum is {MAX_FRAME_ITEMS}"
            raise InvalidArgument(message, field=name, remedy="send several frames", reason="INVALID_FRAME")


def can_name(ref: router_pb2.SequenceRef) -> bool:
    """True if a sequence can have this name; one that none can have is passed over like one that has ended."""
    return 0 < len(ref.request_id) <= MAX_REQUEST_ID_CHARS and ref.choice_index < MAX_CHOICES


def check_submission(submission: router_pb2.Submission, model: inference_pb2.Model) -> SamplingParams:
    """Check every field of a submission. Returns how its tokens are drawn.

    Raises InvalidArgument that names the field, its value, and the bound.
    """
    request_id, prompt_ids = submission.request_id, submission.prompt_ids
    if not (0 < len(request_id) <= MAX_REQUEST_ID_CHARS and _is_plain(request_id)):
        message = (
            f"request_id has {len(request_id)} characters; it must be printable ASCII, 1 to {MAX_REQUEST_ID_CHARS} "
            "characters"
        )
        raise _wrong("request_id", message)
    if not prompt_ids:
        raise _wrong("prompt_ids", "prompt_ids is empty; a prompt has at least one token")
    _check_target(submission, model)
    has_room = submission.is_score or model.is_encoder_decoder
    most = model.max_model_len if has_room else model.max_model_len - 1
    if len(prompt_ids) > most:
        raise _wrong("prompt_ids", f"prompt_ids has {len(prompt_ids)} tokens; the maximum is {most}")
    _check_ids("prompt_ids", prompt_ids, model)
    if submission.HasField("forced_id"):
        if not model.is_encoder_decoder:
            raise _wrong("forced_id", "forced_id is there; it is for models with an encoder alone")
        _check_ids("forced_id", [submission.forced_id], model)
    room = model.max_model_len - (1 if model.is_encoder_decoder else len(prompt_ids))
    max_tokens = _check_stopping(submission.stopping, model, room)
    _check_choices(submission, model, min(max_tokens, room))
    _check_beams(submission)
    if submission.num_logprobs > MAX_LOGPROBS:
        raise _wrong("num_logprobs", f"num_logprobs is {submission.num_logprobs}; the maximum is {MAX_LOGPROBS}")
    if submission.traceparent and not _TRACEPARENT.fullmatch(submission.traceparent):
        shown = repr(submission.traceparent[:60])
        raise _wrong("traceparent", f"traceparent is {shown}; it must be empty or a W3C trace context")
    return _sampling_of(submission.sampling)


def _check_target(submission: router_pb2.Submission, model: inference_pb2.Model) -> None:
    target_ids, is_wanted = submission.target_ids, model.is_encoder_decoder and submission.is_score
    if is_wanted and not target_ids:
        raise _wrong("target_ids", "target_ids is empty; a model with an encoder scores a target of at least one token")
    if target_ids and not is_wanted:
        raise _wrong("target_ids", "target_ids is there; it is for scores by models with an encoder alone")
    if len(target_ids) >= model.max_model_len:
        most = model.max_model_len - 1
        raise _wrong("target_ids", f"target_ids has {len(target_ids)} tokens; the maximum is {most}")
    _check_ids("target_ids", target_ids, model)


def beam_options(submission: router_pb2.Submission) -> BeamOptions | None:
    """Read how a checked submission is searched by beams; None if it is not."""
    asked = submission.beam_search
    if asked.num_beams < 2:
        return None
    return BeamOptions(
        num_beams=asked.num_beams,
        num_return=max(1, len(submission.choices)),
        length_penalty=asked.length_penalty if asked.HasField("length_penalty") else 1.0,
        early_stopping=_EARLY_STOPPING[asked.early_stopping],
    )


def _check_beams(submission: router_pb2.Submission) -> None:
    asked, sampling = submission.beam_search, submission.sampling
    if (size := sampling.no_repeat_ngram_size) > MAX_NGRAM:
        message = f"sampling.no_repeat_ngram_size is {size}; the maximum is {MAX_NGRAM}"
        raise _wrong("sampling.no_repeat_ngram_size", message)
    if asked.num_beams > MAX_BEAMS:
        raise _wrong("beam_search.num_beams", f"beam_search.num_beams is {asked.num_beams}; the maximum is {MAX_BEAMS}")
    if not (math.isfinite(asked.length_penalty) and abs(asked.length_penalty) <= MAX_LENGTH_PENALTY):
        message = f"beam_search.length_penalty is {asked.length_penalty}; it must be from -10 to 10"
        raise _wrong("beam_search.length_penalty", message)
    if asked.early_stopping not in _EARLY_STOPPING:
        message = f"beam_search.early_stopping is {asked.early_stopping}; it must be 0, 1 or 2"
        raise _wrong("beam_search.early_stopping", message)
    if asked.num_beams < 2:
        return
    if submission.is_score:
        raise _wrong("beam_search", "beam_search is there; a score draws nothing")
    indices = [start.choice_index for start in submission.choices] or [0]
    if len(indices) > asked.num_beams or indices != list(range(len(indices))):
        message = f"choices are {indices[:8]}; of {asked.num_beams} beams they are 0 to n - 1, at most as many"
        raise _wrong("choices", message)
    if any(start.output_ids for start in submission.choices):
        raise _wrong("choices", "choices have output_ids; a search begins anew")
    if sampling.temperature or any(getattr(sampling, name) for name in ("presence_penalty", "frequency_penalty")):
        raise _wrong("sampling", "sampling has a temperature or penalties; a search draws nothing")
    if sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1:
        raise _wrong("sampling.repetition_penalty", "sampling.repetition_penalty is there; a search draws nothing")


def _check_stopping(stopping: inference_pb2.Stopping, model: inference_pb2.Model, room: int) -> int:
    """Check when choices end; returns the tokens that a choice may have, not bounded by the room where it is given."""
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else room
    if stopping.HasField("max_tokens") and max_tokens < 1:
        raise _wrong("stopping.max_tokens", "stopping.max_tokens is 0; it must be at least 1")
    if stopping.min_tokens > max_tokens:
        message = f"stopping.min_tokens is {stopping.min_tokens}; max_tokens allows {max_tokens}"
        raise _wrong("stopping.min_tokens", message)
    if len(stopping.stop_ids) > MAX_STOP_IDS:
        message = f"stopping.stop_ids has {len(stopping.stop_ids)} ids; the maximum is {MAX_STOP_IDS}"
        raise _wrong("stopping.stop_ids", message)
    _check_ids("stopping.stop_ids", stopping.stop_ids, model)
    if stopping.stop_strings:
        message = "stopping.stop_strings must be empty: a router knows no text"
        raise _wrong("stopping.stop_strings", message)
    return max_tokens


def _check_choices(submission: router_pb2.Submission, model: inference_pb2.Model, most: int) -> None:
    """Check the choices, each of which may have `most` tokens."""
    choices = submission.choices
    if len(choices) > MAX_CHOICES:
        raise _wrong("choices", f"choices has {len(choices)} entries; the maximum is {MAX_CHOICES}")
    if submission.is_score and len(choices) > 1:
        raise _wrong("choices", f"choices has {len(choices)} entries; a score has one")
    seen: set[int] = set()
    for position, start in enumerate(choices):
        field = f"choices[{position}]"
        if start.choice_index >= MAX_CHOICES:
            message = f"{field}.choice_index is {start.choice_index}; the maximum is {MAX_CHOICES - 1}"
            raise _wrong(f"{field}.choice_index", message)
        if start.choice_index in seen:
            message = f"{field}.choice_index is {start.choice_index}, as that of another choice; give each once"
            raise _wrong(f"{field}.choice_index", message)
        seen.add(start.choice_index)
        if start.output_ids and submission.is_score:
            raise _wrong(f"{field}.output_ids", f"{field}.output_ids must be empty: a score has no output")
        if len(start.output_ids) > most:
            message = f"{field}.output_ids has {len(start.output_ids)} tokens; the choice may have {most}"
            raise _wrong(f"{field}.output_ids", message)
        _check_ids(f"{field}.output_ids", start.output_ids, model)


def _sampling_of(asked: inference_pb2.Sampling) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p if asked.HasField("top_p") else 1.0,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            seed=asked.seed,
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
        )
    except ValueError as error:  # it names the field first
        raise _wrong(f"sampling.{str(error).split()[0]}", f"sampling.{error}") from None


def _check_ids(field: str, ids: Seq[int], model: inference_pb2.Model) -> None:
    if ids and max(ids) >= model.vocab_size:
        raise _wrong(field, f"{field} has {max(ids)}; the vocabulary ends at {model.vocab_size - 1}")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _wrong(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, field=field, reason="INVALID_SUBMISSION")
