"""Tell a lack of memory from every other failure, whichever library met it.

torch raises RuntimeError for what its CPU allocator is refused, a class of its own for a GPU's, and the kernel's answer
comes as OSError where a file is mapped.
"""

import errno

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error, or what it was raised from, says that memory could not be had."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if isinstance(seen, RuntimeError | OSError) and any(word in str(seen).lower() for word in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException, limit: int = 300) -> str:
    """Write what failed as one line: the error's class and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__
