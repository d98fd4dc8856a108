"""The router's settings."""

from dataclasses import dataclass
from pathlib import Path

from collegium.fabric.settings import ByteSize, ServiceSettings, setting
from router_svc.micro_batches import MAX_MICRO_BATCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ServiceSettings):
    """Flags and environment of `python -m router_svc`."""

    model: Path = setting("folder of the checkpoint")
    manifest: Path | None = setting("manifest of the checkpoint; empty: found or made in the cache", default=None)
    model_name: str = setting("name that requests use; empty: the folder's name", default="")
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
    device: str = setting("torch device of attention, such as cpu or cuda:0", default="cpu")
    modelling: str = setting(
        "what computes attention: auto takes our own forward pass where it has a program for the model",
        default="auto",
        choices=("auto", "transformers"),
    )
    kv_memory: ByteSize = setting("memory for keys and values", default=ByteSize(1 << 30), at_least=1)
    max_model_len: int = setting(
        "longest prompt and output together, in tokens; 0: the model's own", default=0, at_least=0
    )
    max_batch_tokens: int = setting("rows of one step", default=512, at_least=1, at_most=16384)
    shared_step_ms: float = setting(
        "how long a step with prompts should take at most while several callers are served, or three steps without, "
        "if that is longer; 0: any time",
        default=100.0,
        at_least=0.0,
    )
    micro_batches: int = setting(
        "parts of a step that take turns while the others' rows are away; 0: as many as pay, as measured",
        default=0,
        at_least=0,
        at_most=MAX_MICRO_BATCHES,
    )
    max_num_seqs: int = setting("sequences that grow at once", default=128, at_least=1)
    max_queued_seqs: int = setting(
        "sequences that wait or grow at once; more are refused, as a bound on memory", default=65_536, at_least=1
    )
    max_queued_tokens: int = setting(
        "tokens of the prompts and replays of all these; more are refused, as a bound on memory",
        default=16_777_216,
        at_least=1,
    )
    max_gateways: int = setting("streams of gateways at once; more are refused", default=1024, at_least=1)
    max_traces: int = setting("traces of experts' choices at once; more are refused", default=16, at_least=1)
    link_transport: str = setting("data path to workers", default="auto", choices=("auto", "unix", "tcp"))
    expert_timeout_s: float = setting("longest wait for one expert call, in seconds", default=10.0, at_least=0.1)
    expert_wait_s: float = setting("longest wait for any expert worker, in seconds", default=30.0, at_least=0.1)
    drain_s: float = setting("longest wait for running requests at SIGTERM, in seconds", default=5.0, at_least=0.0)
    prefetch: str = setting(
        "tell workers which experts the next layer will probably want: off, or else; what they do with it is theirs",
        default="auto",
        choices=("auto", "on", "off"),
    )
    prefetch_layers: int = setting("how many layers ahead workers are told", default=2, at_least=1)
    unsafe_routing: Path | None = setting(
        "for experiments only, answers are then worthless: a trace whose experts replace those that the gates choose",
        default=None,
    )
