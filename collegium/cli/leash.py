"""Start a command that cannot outlive its parent: ask the kernel to kill it with the parent, then become it.

Run by path with the standard library alone, so that it costs a few milliseconds:
`python -IS leash.py PARENT_PID COMMAND`. The parent must start it from a thread that lives as long as the parent: the
kernel watches that thread.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Bind this process to its parent and replace it with the command; returns only where that fails."""
    parent, command = int(argv[0]), argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.stderr.write(f"leash: prctl: {os.strerror(ctypes.get_errno())}\n")
        return 1
    if os.getppid() != parent:  # it died before the kernel was asked
        return 1
    os.setpgid(0, 0)  # the terminal's Ctrl-C is the parent's alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"leash: {command[0]}: {error.strerror}\n")
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
