"""The command line, and the one-machine cluster behind `collegium up`."""

import importlib
import os


def _import_grpc_quietly() -> None:
    # gRPC's core reads this once, at its import. What it logs, our errors say; our children keep their own choice.
    if "GRPC_VERBOSITY" in os.environ:
        importlib.import_module("grpc")
        return
    os.environ["GRPC_VERBOSITY"] = "NONE"
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ["GRPC_VERBOSITY"]


_import_grpc_quietly()
