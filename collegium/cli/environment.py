"""What the processes of `collegium up` see of the environment that `up` was started in.

Owns the choice: which of a stranger's variables would break a service, run code of the working directory, or give all
services what one alone may have. Starts nothing.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

from collegium.fabric.signals import SUPERVISED_ENV
from collegium.launch import absolute_entries
from collegium.model.cache_root import cache_file, cache_notice

# Settings that `up` decides for every service, or that several services of one machine cannot share.
DECIDED = (
    "ADVERTISE",
    "BALANCER",
    "BIND",
    "CLUSTER",
    "DATA_ADVERTISE",
    "DATA_BIND",
    "EXPECTED_WORKERS",
    "HEALTH_BIND",
    "IDLE_START",
    "MAX_WORKERS",
    "METRICS_BIND",
    "ROUTERS",
    "THREADS",
)
# Python's own variables that only say where things are, or help to look into a process. Of the others some end a
# service (PYTHONWARNINGS=error), some change what it does (PYTHONOPTIMIZE) or hide how it ended (PYTHONINSPECT).
_KEPT_OF_PYTHON = frozenset(
    {
        "PYTHONASYNCIODEBUG",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER",
        "PYTHONHASHSEED",
        "PYTHONHOME",
        "PYTHONMALLOC",
        "PYTHONNOUSERSITE",
        "PYTHONPATH",
        "PYTHONPERFSUPPORT",
        "PYTHONPLATLIBDIR",
        "PYTHONPYCACHEPREFIX",
        "PYTHONTRACEMALLOC",
        "PYTHONUSERBASE",
    }
)
# An empty entry of these is the working directory, where a stranger's checkpoint may lie with code beside it.
_LISTS_OF_FOLDERS = frozenset({"LD_LIBRARY_PATH", "PATH", "PYTHONPATH"})
# One process's place on the machine, or its number of threads: all services would crowd onto the same cores.
_OF_ONE_PROCESS = frozenset(
    {
        "GOMP_CPU_AFFINITY",
        "GOTO_NUM_THREADS",
        "KMP_AFFINITY",
        "KMP_HW_SUBSET",
        "MKL_DOMAIN_NUM_THREADS",
        "MKL_DYNAMIC",
        "MKL_NUM_THREADS",
        "OMP_DYNAMIC",
        "OMP_PLACES",
        "OMP_PROC_BIND",
        "OMP_SCHEDULE",
        "OMP_THREAD_LIMIT",
        "OPENBLAS_NUM_THREADS",
    }
)


def service_env(num_threads: int, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Make a service's environment from ours: what is decided for it is taken out, its threads put in."""
    dropped = {f"COLLEGIUM_{name}" for name in DECIDED} | {"REDIS_URL"} | _OF_ONE_PROCESS
    kept = {name: value for name, value in env.items() if name not in dropped and not _is_pythons(name)}
    for name in _LISTS_OF_FOLDERS & kept.keys():
        paths = absolute_entries(kept.pop(name))
        if paths:
            kept[name] = os.pathsep.join(paths)
    return (
        kept
        | _home(env)
        | {
            SUPERVISED_ENV: "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONUTF8": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "RUST_BACKTRACE": "0",
            "GRPC_VERBOSITY": env.get("GRPC_VERBOSITY", "ERROR"),
        }
    )


def _is_pythons(name: str) -> bool:
    return name.startswith("PYTHON") and name not in _KEPT_OF_PYTHON


def _home(env: Mapping[str, str]) -> dict[str, str]:
    """Name a home and a user where there are none: torch and Triton ask for both to place their caches."""
    home: dict[str, str] = {}
    if not _has_home():
        home["HOME"] = str(cache_file("home").parent)
    if cache_notice() and "TRITON_CACHE_DIR" not in env:
        home["TRITON_CACHE_DIR"] = str(cache_file("triton"))
    try:
        getpass.getuser()
    except (OSError, KeyError):  # no variable names it, and this user id has no entry
        home["USER"] = str(os.getuid())
    return home


def _has_home() -> bool:
    try:
        return Path.home().is_absolute()
    except RuntimeError:
        return False
