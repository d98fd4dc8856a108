"""One generate call as a state machine: what to send next, what came, whether it is complete.

Owns everything that a broken stream needs to be taken up again elsewhere. Sends nothing: Client and AsyncClient both
drive it, so there is one copy of the logic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from collegium.client.results import Chunk, Completion, Usage, join_chunks, read_chunk, read_usage
from collegium.fabric.errors import Internal, Unavailable
from collegium.v1 import inference_pb2 as pb


@dataclass(slots=True)
class _Received:
    token_ids: list[int] = field(default_factory=list[int])
    text_offset: int = 0
    finish_reason: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED


class GenerateCall:
    """The call's memory. Not to be shared among threads."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.request = request
        self.model = request.model
        self.seed: int | None = request.sampling.seed if request.sampling.HasField("seed") else None
        self.usage: Usage | None = None
        self._received: dict[int, _Received] = {}

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Ids received, over all choices."""
        return sum(len(received.token_ids) for received in self._received.values())

    @property
    def finish_reasons(self) -> list[str]:
        """Why choices ended, of those that did."""
        ended = (received.finish_reason for received in self._received.values() if received.finish_reason)
        return [pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower() for reason in ended]

    @property
    def is_complete(self) -> bool:
        """Whether the last message has come."""
        return self.usage is not None

    def next_request(self) -> pb.GenerateRequest | pb.ResumeRequest:
        """Give what to send: the request, or how to go on with it where something was delivered already."""
        if not self._received:
            return self.request
        progress = [
            pb.ChoiceProgress(
                choice_index=index,
                token_ids=received.token_ids,
                text_offset=received.text_offset,
                finish_reason=received.finish_reason,
            )
            for index, received in self._received.items()
        ]
        return pb.ResumeRequest(request=self.request, progress=progress)

    def absorb(self, message: pb.GenerateResponse | pb.ResumeResponse) -> list[Chunk]:
        """Take one message of a stream; gives its chunks for the caller."""
        response = message.response if isinstance(message, pb.ResumeResponse) else message
        if response.HasField("start"):
            self.model, self.seed = response.start.model, response.start.seed
            self.request.sampling.seed = response.start.seed  # from here on the answer is determined
        for chunk in response.chunks:
            received = self._received.setdefault(chunk.choice_index, _Received())
            if chunk.token_offset != len(received.token_ids) or chunk.text_offset != received.text_offset:
                raise Internal(
                    f"choice {chunk.choice_index} goes on at token {chunk.token_offset} and character "
                    f"{chunk.text_offset}, after {len(received.token_ids)} and {received.text_offset}",
                    reason="STREAM_GAP",
                )
            received.token_ids.extend(chunk.token_ids)
            received.text_offset += len(chunk.text)
            received.finish_reason = chunk.finish_reason
        if response.HasField("usage"):
            self.usage = read_usage(response.usage)
        return [read_chunk(chunk) for chunk in response.chunks]

    def end_stream(self) -> None:
        """Note that the stream ended well; Unavailable where its last message is missing."""
        if not self.is_complete:
            raise Unavailable("the stream ended before its last message", reason="STREAM_CUT")

    def completion(self, chunks: list[Chunk]) -> Completion:
        """Put a complete call's chunks together."""
        if self.usage is None or self.seed is None:
            raise Internal("the stream is not complete", reason="STREAM_CUT")
        return Completion(
            request_id=self.request_id,
            model=self.model,
            seed=self.seed,
            choices=join_chunks(chunks, self.request.num_choices or 1),
            usage=self.usage,
        )


class CallView:
    """What a stream shows of its call, blocking or not."""

    def __init__(self, call: GenerateCall) -> None:
        self._call = call

    @property
    def request_id(self) -> str:
        """The request's id, for cancel by id and for logs."""
        return self._call.request_id

    @property
    def seed(self) -> int | None:
        """Seed in use: the one given, or from the first chunk on the one drawn."""
        return self._call.seed

    @property
    def usage(self) -> Usage | None:
        """What the request took; None until the last chunk."""
        return self._call.usage
