"""Run Collegium's code, and no file that happens to lie in the working directory or beside a script.

Owns sys.path of the command `collegium` and of every process that `collegium up` starts. Imports the standard library
alone, and little of it: whatever is imported before guard() has run may come from a stranger's folder.
`python -P launch.py MODULE ARGS` runs a module of ours, as `python -m MODULE ARGS` would.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = frozenset({"balancer_svc", "collegium", "expert_svc", "gateway", "router_svc"})


class _OwnPackages:
    """Finds our top-level packages beside this one, whatever else on sys.path has their names."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def guard() -> None:
    """Take the working directory, the script's folder and relative entries of PYTHONPATH off sys.path. Idempotent."""
    if not any(finder is _OwnPackages for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnPackages)
    library = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    ends = [i for i, entry in enumerate(sys.path) if os.path.basename(entry) == library]
    if ends:  # before the standard library stand the script's folder, unless Python was told -P, and PYTHONPATH
        given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
        kept = [os.path.normpath(entry) for entry in absolute_entries(given)]
        sys.path[: ends[0]] = dict.fromkeys(kept)


def absolute_entries(paths: str) -> list[str]:
    """Split a list such as PATH or PYTHONPATH; entries that depend on the working directory, the empty one too, go."""
    return [entry for entry in paths.split(os.pathsep) if os.path.isabs(entry)]


def command() -> int:
    """Be the command `collegium`; gives the exit status."""
    for descriptor in range(3):  # one that the shell closed would become the first file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    guard()
    from collegium.cli.main import main

    return main()


def _run(module: str) -> None:
    guard()
    import runpy

    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(sys.argv[1])
