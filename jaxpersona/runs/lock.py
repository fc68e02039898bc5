"""Let one run at a time write to a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import stat
from collections.abc import Iterator

NAME = ".lock"
_OF_WORKER = re.compile(r"\.lock(\.[1-9][0-9]{0,8})?")


@contextlib.contextmanager
def locked(folder: pathlib.Path, worker: int = 0) -> Iterator[None]:
    """Hold a folder's lock file; the system releases it when this process ends, however it ends.

    Args:
      folder: must exist.
      worker: which process of the run this is. Each has a lock file of its own, and process 0,
        which must come first, makes sure that no process of another run holds one.

    Raises:
      ValueError: another process holds the lock (it is named), the folder cannot be locked, or
        something else than a lock file has its name.
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
    """Whether a file's name is that of a run's lock file; any other is the user's own."""
    return _OF_WORKER.fullmatch(name) is not None


def _take(path: pathlib.Path) -> int:
    folder = path.parent
    while True:
        try:
            # never through a link: what it leads to would be emptied below
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(handle), os.stat(path, follow_symlinks=False)
        except BlockingIOError:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip()
            os.close(handle)
            raise ValueError(f"{folder}: is in use by {owner or 'another process'}; wait until "
                             "that ends, or choose another folder") from None
        except FileNotFoundError:  # its owner has just removed it
            os.close(handle)
            continue
        except OSError as error:
            os.close(handle)
            raise ValueError(f"{folder}: cannot be locked ({error.strerror or error}); choose a "
                             "folder on a file system that has file locks") from None
        if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
            break
        os.close(handle)  # removed by its owner and made anew by another process
    try:
        if not stat.S_ISREG(mine.st_mode):
            raise OSError(f"it is no regular file; remove {path.name}")
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        os.close(handle)
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    return handle


def _release(path: pathlib.Path, handle: int) -> None:
    path.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
    os.close(handle)
