"""Translate between the router's messages and the engine's values. Owns no state."""

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import grpc

from collegium.fabric.errors import CollegiumError
from collegium.v1 import inference_pb2, router_pb2
from router_svc.beams import BeamSearch
from router_svc.choices import StepChoices
from router_svc.news import Load, News
from router_svc.sequence import Finish, Sequence, StopRules
from router_svc.submissions import MAX_CHOICES, beam_options, check_submission

_TRACED_CHOICES = 100_000  # of one message of a trace: some 600 kB
FRAME_NEWS = 1024  # refusals that are gathered into one frame
_REFUSAL_CHARS = 65_536  # of ids in the refusal of one submission

_FINISH = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    Finish.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}


def sequences_of(submission: router_pb2.Submission, owner: int, model: inference_pb2.Model) -> list[Sequence]:
    """Make the sequences of a submission, one a choice. Raises InvalidArgument naming a field that is out of bounds."""
    sampling = check_submission(submission, model)
    prompt, rules = list(submission.prompt_ids), submission.stopping
    source: list[int] = []
    if model.is_encoder_decoder:
        source, prompt = prompt, [model.decoder_start_id, *submission.target_ids]
    room = model.max_model_len - len(prompt)
    asked = submission if submission.HasField("forced_id") else model
    forced = [asked.forced_id] if model.is_encoder_decoder and asked.HasField("forced_id") else []
    stop = StopRules(
        max_tokens=min(rules.max_tokens, room) if rules.HasField("max_tokens") else room,
        min_tokens=rules.min_tokens,
        eos_ids=frozenset() if rules.ignore_eos else frozenset(model.eos_ids),
        stop_ids=frozenset(rules.stop_ids),
    )
    deadline_s = time.monotonic() + submission.deadline_ms / 1e3 if submission.deadline_ms else float("inf")
    sequences: list[Sequence] = []
    for start in submission.choices or [router_pb2.ChoiceStart()]:
        sequences.append(
            Sequence(
                owner=owner,
                request_id=submission.request_id,
                choice_index=start.choice_index,
                prompt_ids=prompt,
                source_ids=source,
                output_ids=list(start.output_ids),
                sampling=sampling,
                rules=stop,
                num_logprobs=submission.num_logprobs if submission.HasField("num_logprobs") else None,
                is_score=submission.is_score,
                deadline_s=deadline_s,
                traceparent=submission.traceparent,
                caller=submission.caller,
                leader=sequences[0] if sequences else None,
            )
        )
        for token in () if start.output_ids or submission.is_score else forced:
            sequences[-1].force(token)
    options = beam_options(submission)
    if options is not None and not sequences[0].has_ended:
        sequences[0].beams = BeamSearch(options, sequences[0].output_ids)
        sequences[0].best = sequences[1:]
        for one in sequences[1:]:
            one.searched_by = sequences[0]
    return sequences


def frame_of(news: Seq[News], load: Load, step: int) -> router_pb2.AttachResponse:
    """Make the frame that tells a gateway of a step."""
    frame = router_pb2.AttachResponse(news=[_news_of(item) for item in news], load=load_of(load), step=step)
    for item in news:  # not before all of it is made: what fails is tried again
        item.sequence.is_reported = True
    return frame


def load_of(load: Load) -> router_pb2.RouterLoad:
    """Translate the load."""
    return router_pb2.RouterLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        waiting_tokens=load.waiting_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
    )


def refusal(submission: router_pb2.Submission, error: CollegiumError) -> list[router_pb2.SequenceNews]:
    """Make the news that refuse a submission for good."""
    return _failed(submission, error.code, error.message, error.reason)


def hand_over(submission: router_pb2.Submission) -> list[router_pb2.SequenceNews]:
    """Make the news that send a submission to another router."""
    return _failed(submission, grpc.StatusCode.UNAVAILABLE, "the router is draining", "DRAINING")


def frame_between(news: Seq[router_pb2.SequenceNews]) -> router_pb2.AttachResponse:
    """Make a frame, between steps, that holds such news."""
    return router_pb2.AttachResponse(news=news)


def trace_header(model: inference_pb2.Model, expert_bytes: Seq[int]) -> router_pb2.TraceResponse:
    """Make the message that opens a trace."""
    return router_pb2.TraceResponse(header=router_pb2.TraceHeader(model=model, expert_bytes=expert_bytes))


def trace_messages(choices: StepChoices) -> Iterator[router_pb2.TraceResponse]:
    """Make the messages that tell what a step chose: one, or several where it is large."""
    at = 0
    while at < len(choices.layers):
        step = router_pb2.TracedStep(
            step=choices.step,
            sequences=choices.sequences,
            positions=choices.positions,
            num_decode_rows=choices.num_decode_rows,
        )
        num_choices = 0
        while at < len(choices.layers) and num_choices < _TRACED_CHOICES:
            layer = choices.layers[at]
            step.layers.add(
                layer=layer.layer,
                experts=layer.ids.ravel().tolist(),
                weights=layer.weights.ravel().tolist(),
                missed=layer.missed.tolist(),
            )
            num_choices += layer.ids.size
            at += 1
        yield router_pb2.TraceResponse(step=step)


def _failed(
    submission: router_pb2.Submission, code: grpc.StatusCode, message: str, reason: str
) -> list[router_pb2.SequenceNews]:
    """Make the news of each choice, at most as many as a request can have, and fewer if the id is a long text."""
    failure = router_pb2.Failure(code=code.value[0], message=message, reason=reason)
    indexes = dict.fromkeys(start.choice_index for start in submission.choices) or [0]
    num_news = max(1, min(MAX_CHOICES, _REFUSAL_CHARS // max(1, len(submission.request_id))))
    return [
        router_pb2.SequenceNews(request_id=submission.request_id, choice_index=index, failure=failure)
        for index in itertools.islice(indexes, num_news)
    ]


def _news_of(item: News) -> router_pb2.SequenceNews:
    sequence = item.sequence
    news = router_pb2.SequenceNews(
        request_id=sequence.request_id, choice_index=sequence.choice_index, token_ids=item.token_ids
    )
    for logprobs in item.logprobs:
        news.logprobs.add(chosen=logprobs.chosen, top_ids=logprobs.top_ids, top=logprobs.top)
    if not sequence.is_reported:
        news.cached_prompt_tokens = sequence.num_cached
    if item.failure is not None:
        news.failure.code = getattr(grpc.StatusCode, item.failure.code).value[0]
        news.failure.message, news.failure.reason = item.failure.message, item.failure.reason
    elif sequence.finish is not None:
        news.finish_reason = _FINISH[sequence.finish]
        if sequence.stop_id is not None:
            news.stop_id = sequence.stop_id
        if sequence.score is not None:
            news.score = sequence.score
    return news
