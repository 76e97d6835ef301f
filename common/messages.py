"""Messages for the user of a program: errors in one line, and notes."""

import pathlib
import shlex
import sys
from functools import cache

from common import torchrun


def fail(message, always=False):
    """Ends the program because of a user error, with one line on stderr and exit code 2. One
    process of each machine prints the line; with `always`, each process prints it, below a
    progress bar."""
    if always:
        print(f"\nerror: {message}", file=sys.stderr)
    elif torchrun.local_rank() == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@cache
def say_once(text):
    """Prints a line on stderr, in one process of each machine, in the first call with this text."""
    if torchrun.local_rank() == 0:
        print(text, file=sys.stderr)


def as_argument(path):
    """A path as an argument in a printed command, with quotes if it has spaces."""
    return shlex.quote(pathlib.Path(path).as_posix())
