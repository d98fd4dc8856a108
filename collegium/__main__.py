"""`python -m collegium` is the command `collegium`."""

import sys

from collegium.launch import command

if __name__ == "__main__":
    sys.exit(command())
