"""The worker's settings."""

from dataclasses import dataclass
from pathlib import Path

from collegium.buffering.policies import POLICIES
from collegium.fabric.settings import ByteSize, MemoryBudget, ServiceSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ServiceSettings):
    """Flags and environment of `python -m expert_svc`."""

    manifest: Path = setting("manifest of the checkpoint, made by `collegium manifest`")
    dtype: str = setting(
        "type of weights and rows; auto: bfloat16 where all experts are stored in it, else float32, also for float16",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
    )
    kernel: str = setting(
        "what multiplies matrices on a CPU; auto: the fastest as measured, once for each machine and shape",
        default="auto",
        choices=("auto", "native", "onednn", "torch"),
    )
    device: str = setting("torch device that computes the experts, such as cpu or cuda:0", default="cpu")
    data_bind: str = setting("address that links connect to, HOST:PORT; port 0 chooses one", default="127.0.0.1:0")
    data_advertise: str = setting(
        "HOST:PORT that routers reach the data port at, port 0: the bound one; empty: the bound address", default=""
    )
    idle_start: bool = setting(
        "start at low priority: a worker that is added must not take the core from those that serve",
        default=False,
    )
    failure_domain: str = setting(
        "workers of equal domains fail together: copies of an expert go to several; empty: the host it advertises",
        default="",
    )
    expert_memory: MemoryBudget = setting(
        "memory for experts' weights, or a share of all the model's experts; empty: as much as its experts need",
        default=MemoryBudget(),
    )
    host_memory: MemoryBudget = setting(
        "memory that stands between expert memory and the disk, or a share of all experts; empty: none",
        default=MemoryBudget(),
    )
    eviction: str = setting("which expert makes room for a missed one", default="ewma", choices=POLICIES)
    load_threads: int = setting("threads that load experts beside the computing one", default=2, at_least=1)
    prefetch: str = setting(
        "load what routers' hints name: on, off, or auto: as long as it is seen to pay",
        default="auto",
        choices=("auto", "on", "off"),
    )
    join_wait: str = setting(
        "hold rows back for a part of a layer's time so that those of other routers join them: on, off, or auto: as "
        "long as it is seen to pay",
        default="auto",
        choices=("auto", "on", "off"),
    )
    link_memory: ByteSize = setting(
        "memory that dispatches of all links may take together; beyond it links wait to be read",
        default=ByteSize(2**30),
        at_least=2**20,
    )
    drain_s: float = setting(
        "longest wait for routers to send elsewhere at SIGTERM, in seconds", default=5.0, at_least=0.0
    )
