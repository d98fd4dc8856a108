"""The C library: arithmetic on packed weights, and both ends of links. Knows no tensor and no model.

Owns the contact with the library, which `make setup` builds: kernels.c and tiles.h compute and know no socket;
router_end.c and worker_end.c move bytes, by the frames of frame.h.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int
from importlib import machinery
from pathlib import Path

ABI = 21  # what collegium_abi() of the library must say


class LibraryMissingError(RuntimeError):
    """The library was not built, or is not this code's."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library; a call lets go of the interpreter's lock. Raises LibraryMissingError."""
    folder = Path(__file__).parent
    path = next((at for end in machinery.EXTENSION_SUFFIXES if (at := folder / f"_native{end}").exists()), None)
    if path is None:
        raise LibraryMissingError(
            "the native library is not built; build it with `make setup`, which needs a C compiler"
        )
    try:
        lib = ctypes.CDLL(str(path))
        declare(lib, "collegium_abi", c_int, [])
        abi: int = lib.collegium_abi()
    except (OSError, AttributeError) as error:
        raise LibraryMissingError(f"{path.name} cannot be loaded: {error}; build it anew with `make setup`") from error
    if abi != ABI:
        raise LibraryMissingError(f"{path.name} is of another version ({abi}, not {ABI}); build it anew: `make setup`")
    return lib


def declare(lib: ctypes.CDLL, name: str, result: type | None, arguments: Sequence[type]) -> None:
    """Give a function of the library its types."""
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
