from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenLinkRequest(_message.Message):
    __slots__ = ("router_id", "model_digest", "dtype", "transports", "max_rows", "host", "model_parts")
    class ModelPartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    MODEL_PARTS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    model_digest: str
    dtype: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    max_rows: int
    host: str
    model_parts: _containers.ScalarMap[str, str]
    def __init__(self, router_id: _Optional[str] = ..., model_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., max_rows: _Optional[int] = ..., host: _Optional[str] = ..., model_parts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class OpenLinkResponse(_message.Message):
    __slots__ = ("link_id", "secret", "transport", "address", "num_credits", "worker_id", "wants_hints")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_CREDITS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WANTS_HINTS_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    secret: bytes
    transport: str
    address: str
    num_credits: int
    worker_id: str
    wants_hints: bool
    def __init__(self, link_id: _Optional[int] = ..., secret: _Optional[bytes] = ..., transport: _Optional[str] = ..., address: _Optional[str] = ..., num_credits: _Optional[int] = ..., worker_id: _Optional[str] = ..., wants_hints: _Optional[bool] = ...) -> None: ...

class GetWorkerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResidentLayer(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class GetWorkerResponse(_message.Message):
    __slots__ = ("worker_id", "resident", "resident_bytes", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    resident: _containers.RepeatedCompositeFieldContainer[ResidentLayer]
    resident_bytes: int
    counters: _containers.ScalarMap[str, float]
    def __init__(self, worker_id: _Optional[str] = ..., resident: _Optional[_Iterable[_Union[ResidentLayer, _Mapping]]] = ..., resident_bytes: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ...) -> None: ...
