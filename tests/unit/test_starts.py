"""What each process imports until it serves: nothing heavy that its role does not need."""

import subprocess
import sys
from pathlib import Path

import pytest

from collegium.model import native

ROOT = Path(__file__).parents[2]
SDK = "import collegium.client, collegium.cli.main"
UP = "import collegium.cli.up"
GATEWAY = "import gateway.__main__"
BALANCER = "import balancer_svc.__main__"
WORKER = "import expert_svc.app"
# A router of a model of the family, once it is loaded: the model library is for the others.
ROUTER = f"""
import pathlib, torch, router_svc.app
from router_svc.model_loader import load_router_model
load_router_model(pathlib.Path({str(ROOT / "models" / "demo-lm")!r}), torch.float32, torch.device("cpu"))
"""
MODEL_LIBRARY = ("transformers", "huggingface_hub", "tokenizers", "jinja2")
# Seconds of a core: what torch imports on demand for compiling and for its own ways of distributing.
COMPILERS = ("sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton")
SERVICE = ("uvloop", "prometheus_client", "opentelemetry.sdk", "redis")

NOT_NEEDED = {
    SDK: ("torch", "numpy", "safetensors", *MODEL_LIBRARY[:3], *SERVICE),
    UP: ("torch", "safetensors", *MODEL_LIBRARY, *SERVICE),
    GATEWAY: ("torch", "safetensors", "transformers", "huggingface_hub", "redis"),
    BALANCER: ("torch", "safetensors", *MODEL_LIBRARY),
    WORKER: (*MODEL_LIBRARY, *COMPILERS, "redis"),
    ROUTER: (*MODEL_LIBRARY, *COMPILERS, "redis"),
}


@pytest.mark.parametrize("role", NOT_NEEDED, ids=["sdk", "up", "gateway", "balancer", "worker", "router"])
def test_a_process_imports_nothing_heavy_that_its_role_does_not_need(role: str) -> None:
    if role == ROUTER and native.library() is None:
        pytest.skip("without the native kernels the model library computes")
    script = f"{role}\nimport sys\nprint(*[name for name in {NOT_NEEDED[role]!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[-2].split() == []
