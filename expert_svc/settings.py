"""The worker's settings."""

from dataclasses import dataclass
from pathlib import Path

from collegium.fabric.settings import ServiceSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ServiceSettings):
    """Flags and environment of `python -m expert_svc`."""

    manifest: Path = setting("manifest of the checkpoint, made by `collegium manifest`")
    dtype: str = setting("type of weights and rows", default="auto", choices=("auto", "float32", "bfloat16"))
    data_bind: str = setting("address that links connect to, HOST:PORT; port 0 chooses one", default="127.0.0.1:0")
    data_advertise: str = setting(
        "host or HOST:PORT that routers reach the data port at; empty: the bound one", default=""
    )
    drain_s: float = setting(
        "time that routers get to send elsewhere at SIGTERM, in seconds", default=0.2, at_least=0.0
    )
