from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_ROUTER: _ClassVar[Role]
    ROLE_WORKER: _ClassVar[Role]

class MemberState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_STATE_UNSPECIFIED: _ClassVar[MemberState]
    MEMBER_STATE_JOINING: _ClassVar[MemberState]
    MEMBER_STATE_SERVING: _ClassVar[MemberState]
    MEMBER_STATE_DRAINING: _ClassVar[MemberState]
    MEMBER_STATE_RETIRING: _ClassVar[MemberState]
ROLE_UNSPECIFIED: Role
ROLE_GATEWAY: Role
ROLE_ROUTER: Role
ROLE_WORKER: Role
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_JOINING: MemberState
MEMBER_STATE_SERVING: MemberState
MEMBER_STATE_DRAINING: MemberState
MEMBER_STATE_RETIRING: MemberState

class ModelShape(_message.Message):
    __slots__ = ("digest", "layers", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerShape]
    parts: _containers.ScalarMap[str, str]
    def __init__(self, digest: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerShape, _Mapping]]] = ..., parts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LayerShape(_message.Message):
    __slots__ = ("num_experts", "expert_bytes")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    expert_bytes: int
    def __init__(self, num_experts: _Optional[int] = ..., expert_bytes: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("role", "address", "metrics_url", "num_threads", "model", "capacity_bytes", "seen_epoch", "failure_domain")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FAILURE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    role: Role
    address: str
    metrics_url: str
    num_threads: int
    model: ModelShape
    capacity_bytes: int
    seen_epoch: int
    failure_domain: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., metrics_url: _Optional[str] = ..., num_threads: _Optional[int] = ..., model: _Optional[_Union[ModelShape, _Mapping]] = ..., capacity_bytes: _Optional[int] = ..., seen_epoch: _Optional[int] = ..., failure_domain: _Optional[str] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("member_id", "ttl_ms")
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    ttl_ms: int
    def __init__(self, member_id: _Optional[str] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("member_id", "state", "ready_plan", "counters", "seen_epoch")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    READY_PLAN_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    state: MemberState
    ready_plan: int
    counters: _containers.ScalarMap[str, float]
    seen_epoch: int
    def __init__(self, member_id: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., ready_plan: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., seen_epoch: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("member_id",)
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    def __init__(self, member_id: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Member(_message.Message):
    __slots__ = ("member_id", "role", "address", "state", "metrics_url", "num_threads", "counters", "capacity_bytes", "ready_plan", "failure_domain", "seen_epoch", "num_renewals", "joined_unix_ms", "counted_unix_ms")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_PLAN_FIELD_NUMBER: _ClassVar[int]
    FAILURE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_RENEWALS_FIELD_NUMBER: _ClassVar[int]
    JOINED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    role: Role
    address: str
    state: MemberState
    metrics_url: str
    num_threads: int
    counters: _containers.ScalarMap[str, float]
    capacity_bytes: int
    ready_plan: int
    failure_domain: str
    seen_epoch: int
    num_renewals: int
    joined_unix_ms: int
    counted_unix_ms: int
    def __init__(self, member_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., metrics_url: _Optional[str] = ..., num_threads: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., capacity_bytes: _Optional[int] = ..., ready_plan: _Optional[int] = ..., failure_domain: _Optional[str] = ..., seen_epoch: _Optional[int] = ..., num_renewals: _Optional[int] = ..., joined_unix_ms: _Optional[int] = ..., counted_unix_ms: _Optional[int] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("offsets", "worker_idx")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDX_FIELD_NUMBER: _ClassVar[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    worker_idx: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offsets: _Optional[_Iterable[int]] = ..., worker_idx: _Optional[_Iterable[int]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "worker_ids", "layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    def __init__(self, epoch: _Optional[int] = ..., worker_ids: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ...) -> None: ...

class WatchPlacementRequest(_message.Message):
    __slots__ = ("member_id",)
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    def __init__(self, member_id: _Optional[str] = ...) -> None: ...

class WatchPlacementResponse(_message.Message):
    __slots__ = ("placement", "planned", "members", "wanted_workers", "balance")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WANTED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    planned: Placement
    members: _containers.RepeatedCompositeFieldContainer[Member]
    wanted_workers: int
    balance: Balance
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., planned: _Optional[_Union[Placement, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., wanted_workers: _Optional[int] = ..., balance: _Optional[_Union[Balance, _Mapping]] = ...) -> None: ...

class Evenness(_message.Message):
    __slots__ = ("min", "p50", "mean")
    MIN_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    min: float
    p50: float
    mean: float
    def __init__(self, min: _Optional[float] = ..., p50: _Optional[float] = ..., mean: _Optional[float] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("layer", "expert", "share")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    share: float
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., share: _Optional[float] = ...) -> None: ...

class Balance(_message.Message):
    __slots__ = ("decode", "prefill", "num_windows", "since_plan_ms", "last_decision", "moves", "moved_bytes", "row_ns", "activation_ns", "is_leader", "has_memory", "hottest", "retiring")
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    NUM_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    SINCE_PLAN_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_DECISION_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_NS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_NS_FIELD_NUMBER: _ClassVar[int]
    IS_LEADER_FIELD_NUMBER: _ClassVar[int]
    HAS_MEMORY_FIELD_NUMBER: _ClassVar[int]
    HOTTEST_FIELD_NUMBER: _ClassVar[int]
    RETIRING_FIELD_NUMBER: _ClassVar[int]
    decode: Evenness
    prefill: Evenness
    num_windows: int
    since_plan_ms: int
    last_decision: str
    moves: int
    moved_bytes: int
    row_ns: float
    activation_ns: float
    is_leader: bool
    has_memory: bool
    hottest: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    retiring: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, decode: _Optional[_Union[Evenness, _Mapping]] = ..., prefill: _Optional[_Union[Evenness, _Mapping]] = ..., num_windows: _Optional[int] = ..., since_plan_ms: _Optional[int] = ..., last_decision: _Optional[str] = ..., moves: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., row_ns: _Optional[float] = ..., activation_ns: _Optional[float] = ..., is_leader: _Optional[bool] = ..., has_memory: _Optional[bool] = ..., hottest: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., retiring: _Optional[_Iterable[str]] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("decode_tokens", "prefill_tokens", "activations")
    DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    decode_tokens: _containers.RepeatedScalarFieldContainer[int]
    prefill_tokens: _containers.RepeatedScalarFieldContainer[int]
    activations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, decode_tokens: _Optional[_Iterable[int]] = ..., prefill_tokens: _Optional[_Iterable[int]] = ..., activations: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportLoadRequest(_message.Message):
    __slots__ = ("member_id", "layers")
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, member_id: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class ReportLoadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadWindow(_message.Message):
    __slots__ = ("unix_ms", "length_ms", "layers")
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_MS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    unix_ms: int
    length_ms: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, unix_ms: _Optional[int] = ..., length_ms: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("num_workers",)
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    num_workers: int
    def __init__(self, num_workers: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("num_workers", "retiring")
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    RETIRING_FIELD_NUMBER: _ClassVar[int]
    num_workers: int
    retiring: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, num_workers: _Optional[int] = ..., retiring: _Optional[_Iterable[str]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("view",)
    VIEW_FIELD_NUMBER: _ClassVar[int]
    view: WatchPlacementResponse
    def __init__(self, view: _Optional[_Union[WatchPlacementResponse, _Mapping]] = ...) -> None: ...
