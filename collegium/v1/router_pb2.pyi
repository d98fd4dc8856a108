from collegium.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("router_id", "model")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    model: _inference_pb2.Model
    def __init__(self, router_id: _Optional[str] = ..., model: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("gateway_id", "submissions", "cancellations", "pauses", "unpauses")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    CANCELLATIONS_FIELD_NUMBER: _ClassVar[int]
    PAUSES_FIELD_NUMBER: _ClassVar[int]
    UNPAUSES_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    submissions: _containers.RepeatedCompositeFieldContainer[Submission]
    cancellations: _containers.RepeatedCompositeFieldContainer[SequenceRef]
    pauses: _containers.RepeatedCompositeFieldContainer[SequenceRef]
    unpauses: _containers.RepeatedCompositeFieldContainer[SequenceRef]
    def __init__(self, gateway_id: _Optional[str] = ..., submissions: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ..., cancellations: _Optional[_Iterable[_Union[SequenceRef, _Mapping]]] = ..., pauses: _Optional[_Iterable[_Union[SequenceRef, _Mapping]]] = ..., unpauses: _Optional[_Iterable[_Union[SequenceRef, _Mapping]]] = ...) -> None: ...

class SequenceRef(_message.Message):
    __slots__ = ("request_id", "choice_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice_index: int
    def __init__(self, request_id: _Optional[str] = ..., choice_index: _Optional[int] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("request_id", "prompt_ids", "sampling", "stopping", "choices", "num_logprobs", "is_score", "traceparent", "deadline_ms", "caller", "forced_id", "beam_search", "target_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IS_SCORE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    FORCED_ID_FIELD_NUMBER: _ClassVar[int]
    BEAM_SEARCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.Sampling
    stopping: _inference_pb2.Stopping
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceStart]
    num_logprobs: int
    is_score: bool
    traceparent: str
    deadline_ms: int
    caller: int
    forced_id: int
    beam_search: _inference_pb2.BeamSearch
    target_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., stopping: _Optional[_Union[_inference_pb2.Stopping, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[ChoiceStart, _Mapping]]] = ..., num_logprobs: _Optional[int] = ..., is_score: _Optional[bool] = ..., traceparent: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., caller: _Optional[int] = ..., forced_id: _Optional[int] = ..., beam_search: _Optional[_Union[_inference_pb2.BeamSearch, _Mapping]] = ..., target_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChoiceStart(_message.Message):
    __slots__ = ("choice_index", "output_ids")
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    choice_index: int
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, choice_index: _Optional[int] = ..., output_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("news", "load", "step")
    NEWS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    news: _containers.RepeatedCompositeFieldContainer[SequenceNews]
    load: RouterLoad
    step: int
    def __init__(self, news: _Optional[_Iterable[_Union[SequenceNews, _Mapping]]] = ..., load: _Optional[_Union[RouterLoad, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class SequenceNews(_message.Message):
    __slots__ = ("request_id", "choice_index", "token_ids", "logprobs", "finish_reason", "failure", "cached_prompt_tokens", "stop_id", "score")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    finish_reason: _inference_pb2.FinishReason
    failure: Failure
    cached_prompt_tokens: int
    stop_id: int
    score: float
    def __init__(self, request_id: _Optional[str] = ..., choice_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., cached_prompt_tokens: _Optional[int] = ..., stop_id: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RouterLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "waiting_tokens", "free_blocks", "total_blocks")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("header", "step")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    header: TraceHeader
    step: TracedStep
    def __init__(self, header: _Optional[_Union[TraceHeader, _Mapping]] = ..., step: _Optional[_Union[TracedStep, _Mapping]] = ...) -> None: ...

class TraceHeader(_message.Message):
    __slots__ = ("model", "expert_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: _inference_pb2.Model
    expert_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ..., expert_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class TracedStep(_message.Message):
    __slots__ = ("step", "sequences", "positions", "num_decode_rows", "layers")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    step: int
    sequences: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    num_decode_rows: int
    layers: _containers.RepeatedCompositeFieldContainer[TracedLayer]
    def __init__(self, step: _Optional[int] = ..., sequences: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., num_decode_rows: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[TracedLayer, _Mapping]]] = ...) -> None: ...

class TracedLayer(_message.Message):
    __slots__ = ("layer", "experts", "weights", "missed")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    missed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[float]] = ..., missed: _Optional[_Iterable[int]] = ...) -> None: ...
