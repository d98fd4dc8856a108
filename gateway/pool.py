"""All routers that this gateway knows, and the choice among them.

Owns the set of attachments and the prefix table. A router that is attached can be used whatever the list says: only the
stream's own end proves that a router is gone, and an empty list may come from a balancer that has just started.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from grpc import aio

from collegium.fabric import logs, metrics
from collegium.fabric.errors import Unavailable
from collegium.fabric.model_shape import tell_other_model
from collegium.model import identity
from collegium.model.checkpoint_files import shown
from collegium.v1 import inference_pb2 as pb
from gateway.attachment import Attachment
from gateway.choose import PrefixTable, choose

_log = logs.get("gateway.routers")
_RETRY_S = 1.0


class RouterPool:
    """Attachments by address, as an async context manager. `on_serving` learns whether any router can serve."""

    def __init__(
        self,
        *,
        gateway_id: str,
        connect: Callable[[str], aio.Channel],
        on_serving: Callable[[bool], None] = lambda _: None,
        own_parts: Mapping[str, str] | None = None,
    ) -> None:
        """`own_parts`: digests of this gateway's tokenizer and template, which routers' checkpoints must share."""
        self._gateway_id = gateway_id
        self._connect = connect
        self._own_parts = own_parts or {}
        self._on_serving = on_serving
        self._attachments: dict[str, Attachment] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._prefixes = PrefixTable()
        self._can_serve = asyncio.Event()
        self._model: pb.Model | None = None

    async def __aenter__(self) -> RouterPool:
        """Begin with no routers."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every stream."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._attachments.clear()

    @property
    def model_name(self) -> str:
        """The model's name; empty until the first router was attached."""
        return "" if self._model is None else self._model.name

    @property
    def model(self) -> pb.Model:
        """The model that the routers run; Unavailable until the first one was attached."""
        if self._model is None:
            raise Unavailable(
                "no router has been attached yet",
                reason="NO_ROUTER",
                remedy="wait until the cluster is SERVING",
                retry_after_s=_RETRY_S,
            )
        return self._model

    @property
    def can_serve(self) -> bool:
        """Whether any router can take a request now."""
        return bool(self._able())

    @property
    def attachments(self) -> Collection[Attachment]:
        """Every router known, attached or not."""
        return self._attachments.values()

    def set_addresses(self, addresses: Collection[str]) -> None:
        """Attach to new routers, and let go of those that are gone from the list once their stream has ended."""
        for address in addresses:
            self._leaving.discard(address)
            if address not in self._attachments:
                attachment = Attachment(
                    address,
                    gateway_id=self._gateway_id,
                    connect=self._connect,
                    why_not=self._why_not,
                    on_change=self._take_change,
                )
                self._attachments[address] = attachment
                self._tasks[address] = asyncio.create_task(attachment.run(), name=f"router-{address}")
        for address in set(self._attachments) - set(addresses):
            self._leaving.add(address)
            self._let_go(self._attachments[address])
        self._announce()

    async def pick(self, prompt_ids: Sequence[int], *, wait_s: float, avoid: Attachment | None = None) -> Attachment:
        """Choose the router for a prompt, waiting up to wait_s for one that can serve; else Unavailable.

        avoid: not this one where another can serve.
        """
        able = self._able()
        if not able:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while not able:
                        await self._can_serve.wait()
                        able = self._able()
        if not able:
            raise Unavailable(
                f"no router could serve within {wait_s:g} s",
                reason="NO_ROUTER",
                remedy="try again, or look at `collegium status`",
                retry_after_s=_RETRY_S,
            )
        others = [attachment for attachment in able if attachment is not avoid] or able
        chosen = choose([attachment.candidate() for attachment in others], self._prefixes.find(prompt_ids))
        self._prefixes.note(prompt_ids, chosen.address)
        return self._attachments[chosen.address]

    def _able(self) -> list[Attachment]:
        able = [a for a in self._attachments.values() if a.can_serve]
        if not able:
            self._can_serve.clear()
        return able

    def _why_not(self, model: pb.Model) -> str:
        """Say why a router that runs this model cannot be used; "" if it can, and then it is the model."""
        if why := _tell_own(self._own_parts, model):
            return why
        # All routers must grow the same tokens. With none attached the cluster may have changed its model.
        is_first = not any(attachment.is_attached for attachment in self._attachments.values())
        if is_first and model != self._model:
            self._model = model
            metrics.registry().model_name = model.name
            _log.info("serving", model=model.name, architecture=model.architecture, max_model_len=model.max_model_len)
        return "" if model == self._model or self._model is None else _tell_others(self._model, model)

    def _take_change(self, attachment: Attachment) -> None:
        if not attachment.is_attached:
            self._prefixes.forget(attachment.address)
            self._let_go(attachment)
        self._announce()

    def _announce(self) -> None:
        can_serve = bool(self._able())
        if can_serve:
            self._can_serve.set()
        self._on_serving(can_serve)

    def _let_go(self, attachment: Attachment) -> None:
        address = attachment.address
        if address in self._leaving and not attachment.is_attached:
            self._leaving.discard(address)
            self._attachments.pop(address, None)
            task = self._tasks.pop(address, None)
            if task is not None:
                task.cancel()


def _tell_own(own: Mapping[str, str], model: pb.Model) -> str:
    """Say how a router's tokenizer or template differs from this gateway's. A side that has none cannot differ."""
    shared = [name for name, part in own.items() if part and model.parts.get(name)]
    ours, theirs = ({name: parts[name] for name in shared} for parts in (own, model.parts))
    told = identity.tell_differences(ours, theirs)
    return told and f"its {told} from this gateway's; give both the same checkpoint"


def _tell_others(known: pb.Model, model: pb.Model) -> str:
    """Say how a router's model differs from that of the routers that are attached."""
    if model.digest != known.digest:
        told = tell_other_model(model.digest, model.parts, known.digest, known.parts)
        return f"compared with the attached routers, {told}"
    fields = ("name", "max_model_len", "dtype", "architecture", "vocab_size", "eos_ids", "top_k", "num_experts")
    named = next((f for f in fields if getattr(model, f) != getattr(known, f)), "description")
    ours, theirs = (shown(getattr(one, named, "")) for one in (known, model))
    return f"its {named} is {theirs}, the attached routers' {ours}"
