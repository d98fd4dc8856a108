"""Compute several micro-batches of a step in one thread, by turns: one goes on while the rows of others are away.

Owns the turns. Each part runs in a greenlet of its own: a part that has sent its rows calls `pause`, and the next one
goes on where it stood. Threads would do the same for more: at every turn they hand over the interpreter's lock and
wake each other, which costs more than a layer of a small step. Parts take turns in a fixed order, so that a prompt's
later rows find what its earlier ones, in a part before theirs, put into the cache at the same layer.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


def by_turns(parts: Sequence[Callable[[], T]], enter: Callable[[int], None]) -> list[T]:
    """Run parts to their ends and return what they returned. `enter(i)` is called before each turn of part i.

    What one raises ends all: the others are unwound from their `pause`, which raises GreenletExit in them, and the
    error goes on.
    """
    lets = [greenlet(part) for part in parts]
    results: dict[int, T] = {}
    try:
        while len(results) < len(parts):
            for idx, let in enumerate(lets):
                if idx not in results:
                    enter(idx)
                    value = let.switch()
                    if let.dead:
                        results[idx] = value
    except BaseException:
        for idx, let in enumerate(lets):
            if let and not let.dead:
                enter(idx)
                with contextlib.suppress(Exception):  # the error that came first is the one to tell
                    let.throw()
        raise
    return [results[idx] for idx in range(len(parts))]


def pause() -> None:
    """Let the other parts go on until the turn comes round; nothing happens outside of `by_turns`."""
    parent = getcurrent().parent
    if parent is not None:
        parent.switch()
