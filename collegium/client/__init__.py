"""The SDK: `Client` and `AsyncClient` for a Collegium cluster.

Imports neither torch nor redis nor transformers. Errors are those of collegium.fabric.errors, also named here.
"""

from collegium.client.aio import AsyncClient, AsyncStream
from collegium.client.options import GenerateOptions, Message
from collegium.client.results import (
    Balance,
    Choice,
    Chunk,
    Cluster,
    Completion,
    Evenness,
    Member,
    Model,
    Scaling,
    Score,
    TokenLogprobs,
    Translated,
    Translation,
    Usage,
)
from collegium.client.retry import RetryPolicy
from collegium.client.sync import Client, Stream
from collegium.client.translate_call import TranslateOptions
from collegium.fabric.errors import (
    Cancelled,
    CollegiumError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Balance",
    "Cancelled",
    "Choice",
    "Chunk",
    "Client",
    "Cluster",
    "CollegiumError",
    "Completion",
    "DeadlineExceeded",
    "Evenness",
    "FailedPrecondition",
    "GenerateOptions",
    "Internal",
    "InvalidArgument",
    "Member",
    "Message",
    "Model",
    "NotFound",
    "ResourceExhausted",
    "RetryPolicy",
    "Scaling",
    "Score",
    "Stream",
    "TokenLogprobs",
    "TranslateOptions",
    "Translated",
    "Translation",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
