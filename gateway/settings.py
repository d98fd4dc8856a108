"""What a gateway can be told, and which of it fits together. Read once, at the start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collegium.fabric.errors import SettingsError
from collegium.fabric.settings import ByteSize, ServiceSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings(ServiceSettings):
    """A gateway's settings beside those of every service."""

    model: Path = setting("folder of the checkpoint; only its tokenizer files are read")
    routers: tuple[str, ...] = setting("routers by HOST:PORT, instead of a balancer", default=())
    max_requests: int = setting("requests served at once; more are refused", default=1024, at_least=1)
    max_sequences: int = setting(
        "choices served at once; a request for several that would exceed it is refused", default=4096, at_least=1
    )
    max_output_tokens: int = setting(
        "tokens that choices may still grow to; a request for several choices that would exceed it is refused",
        default=2**26,
        at_least=1,
    )
    max_queued_tokens: int = setting("prompt tokens that may wait for their first answer", default=262_144, at_least=1)
    text_limit_s: float = setting(
        "processor time to render and tokenise one prompt, and as much again for each MiB of it",
        default=2.0,
        at_least=0.05,
        unit="S",
    )
    text_memory: ByteSize = setting(
        "memory to render and tokenise one prompt, of which two may be at work",
        default=ByteSize(256 * 2**20),  # both beside the gateway within the chart's limit of 1 GiB
        at_least=16 * 2**20,
    )
    router_wait_s: float = setting("how long a request waits for a router", default=30.0, at_least=0.0, unit="S")
    stall_timeout_s: float = setting(
        "how long a caller may not read before its request ends", default=60.0, at_least=0.05, unit="S"
    )
    drain_s: float = setting("how long running requests may go on after SIGTERM", default=5.0, at_least=0.0, unit="S")
    tls_cert: Path | None = setting("certificate chain in PEM; with it the gateway speaks TLS", default=None)
    tls_key: Path | None = setting("private key in PEM", default=None)
    api_keys: Path | None = setting("file of accepted API keys, one a line", default=None)
    max_message_bytes: ByteSize = setting(
        "largest request", default=ByteSize(4 * 2**20), at_least=1024, at_most=16 * 2**20
    )

    def check(self) -> None:
        """Raise SettingsError where settings do not fit together."""
        if not self.model.is_dir():
            raise SettingsError(f"--model={self.model} is not a folder; give the folder of a checkpoint")
        if bool(self.balancer) == bool(self.routers):
            raise SettingsError("give one of --balancer and --routers")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together; give both or neither")
