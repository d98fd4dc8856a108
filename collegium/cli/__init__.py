"""The command line, and the one-machine cluster behind `collegium up`."""

import importlib
import os
import sys


def _leave_working_directory() -> None:
    # `python -c` has it first on the path; launch.guard() does more, where it comes to run before any import.
    if sys.argv[:1] == ["-c"]:
        sys.path[:] = [entry for entry in sys.path if entry]


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


_leave_working_directory()
_import_grpc_quietly()
