"""Folders that one program owns, and a check that files can be written."""

import contextlib
import errno
import os
import socket

from common import torchrun
from common.messages import fail, say_once

LOCKS = []                                 # (file, its path); a lock ends with its file


def own(folder):
    """Creates a folder, if it does not exist, and makes this program its owner until the program
    ends, even if it is killed. Under torchrun one process calls this.

    Returns the folders that were created, the innermost first. Raises ValueError if another program
    owns the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; use another --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:                    # Windows does not have it, so folders have no owner
        return made
    path = folder / ".owner"
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):    # as on file systems of some clusters
            say_once(f"{folder} is on a file system without locks ({e.strerror}): nothing prevents "
                     "a second program from writing into it")
            file.close()
            path.unlink(missing_ok=True)
            return made
        file.seek(0)
        raise ValueError(f"{folder} belongs to a running program, {file.read().strip()}; wait for "
                         "it, stop it, or use another --out") from None
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        own(folder)                        # the last owner has just removed this file
        return made
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    LOCKS.append((file, path.resolve()))
    return made


def remove_empty(made):
    """Removes folders, the innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def disown(folder):
    """Releases a folder that this program owns."""
    for file, path in [lock for lock in LOCKS if lock[1].parent == folder.resolve()]:
        LOCKS.remove((file, path))
        path.unlink(missing_ok=True)
        file.close()


def disown_all():
    """Releases all folders that this program owns."""
    for _, path in list(LOCKS):
        disown(path.parent)


def check_output(*paths):
    """Creates the folders of these files (pathlib.Path or None), and ends the program, before it
    does any work, if one of the files cannot be written. Process 0 does both."""
    if torchrun.rank() != 0:
        return
    for path in paths:
        if path is None:
            continue
        try:
            new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            open(path, "ab").close()
            if new:
                path.unlink()
        except OSError as e:
            fail(f"{path} cannot be written ({type(e).__name__})")
