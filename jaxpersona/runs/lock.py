"""Lock files, which prevent two runs from writing to the same folder at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import stat
from collections.abc import Iterator

from jaxpersona.errors import UserError

NAME = ".lock"
_OF_WORKER = re.compile(r"\.lock(\.[1-9][0-9]{0,8})?")


@contextlib.contextmanager
def locked(folder: pathlib.Path, worker: int = 0) -> Iterator[None]:
    """Hold the lock on a folder for the duration of the `with` block.

    If the process is killed, the operating system releases the lock.

    Args:
      folder: an existing folder.
      worker: the index of this process in the run. Each process has its own lock file. Process 0
        must lock first, because it checks that no process of another run holds a lock.

    Raises:
      UserError: another process holds the lock (the message contains the process id and the host),
        the folder cannot be locked, or the lock path is not a regular file.
    """
    path = folder / (NAME if worker == 0 else f"{NAME}.{worker}")
    handle = _take(path)
    try:
        if worker == 0:
            for other in sorted(folder.glob(f"{NAME}.*")):
                if is_lock(other.name):
                    _release(other, _take(other))
        yield
    finally:
        _release(path, handle)


def is_lock(name: str) -> bool:
    """Return whether `name` is the file name of a run's lock file."""
    return _OF_WORKER.fullmatch(name) is not None


def _take(path: pathlib.Path) -> int:
    folder = path.parent
    while True:
        try:
            # O_NOFOLLOW: the code below must not truncate the target of a symbolic link
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, current = os.fstat(handle), os.stat(path, follow_symlinks=False)
        except BlockingIOError:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip()
            os.close(handle)
            raise UserError(f"{folder} is in use by {owner or 'another process'}; wait until "
                            "it ends, or choose another folder") from None
        except FileNotFoundError:  # the owner has just removed the lock file: retry
            os.close(handle)
            continue
        except OSError as error:
            os.close(handle)
            raise UserError(f"{folder}: cannot be locked ({error.strerror or error}); choose a "
                            "folder on a file system that supports file locks") from None
        if (opened.st_dev, opened.st_ino) == (current.st_dev, current.st_ino):
            break
        os.close(handle)  # another process has replaced the lock file: retry
    try:
        if not stat.S_ISREG(opened.st_mode):
            raise OSError(f"it is not a regular file; remove {path.name}")
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        os.close(handle)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return handle


def _release(path: pathlib.Path, handle: int) -> None:
    # unlink before unlocking, so that no other process can lock a file that is about to be removed
    path.unlink(missing_ok=True)
    os.close(handle)
