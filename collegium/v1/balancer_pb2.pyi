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
ROLE_UNSPECIFIED: Role
ROLE_GATEWAY: Role
ROLE_ROUTER: Role
ROLE_WORKER: Role
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_JOINING: MemberState
MEMBER_STATE_SERVING: MemberState
MEMBER_STATE_DRAINING: MemberState

class ModelShape(_message.Message):
    __slots__ = ("digest", "layers")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerShape]
    def __init__(self, digest: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerShape, _Mapping]]] = ...) -> None: ...

class LayerShape(_message.Message):
    __slots__ = ("num_experts", "expert_bytes")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    expert_bytes: int
    def __init__(self, num_experts: _Optional[int] = ..., expert_bytes: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("role", "address", "metrics_url", "num_threads", "model", "capacity_bytes", "seen_epoch")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    role: Role
    address: str
    metrics_url: str
    num_threads: int
    model: ModelShape
    capacity_bytes: int
    seen_epoch: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., metrics_url: _Optional[str] = ..., num_threads: _Optional[int] = ..., model: _Optional[_Union[ModelShape, _Mapping]] = ..., capacity_bytes: _Optional[int] = ..., seen_epoch: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("member_id", "role", "address", "state", "metrics_url", "num_threads", "counters", "capacity_bytes", "ready_plan")
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
    member_id: str
    role: Role
    address: str
    state: MemberState
    metrics_url: str
    num_threads: int
    counters: _containers.ScalarMap[str, float]
    capacity_bytes: int
    ready_plan: int
    def __init__(self, member_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., state: _Optional[_Union[MemberState, str]] = ..., metrics_url: _Optional[str] = ..., num_threads: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., capacity_bytes: _Optional[int] = ..., ready_plan: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("placement", "planned", "members")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    planned: Placement
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., planned: _Optional[_Union[Placement, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("view",)
    VIEW_FIELD_NUMBER: _ClassVar[int]
    view: WatchPlacementResponse
    def __init__(self, view: _Optional[_Union[WatchPlacementResponse, _Mapping]] = ...) -> None: ...
