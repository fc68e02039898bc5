"""A folder of limited size whose files can be read and written only by their owner.

The content of these files determines which machine code runs, so files that another user could have
modified are not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator

_LOG = logging.getLogger("jaxpersona")
_MAGIC = b"jaxpersona-file 1\n"
_TEMPORARY = ".tmp"
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private(path: pathlib.Path) -> str | None:
    """Create a folder with mode 0700, or check an existing folder.

    An existing folder must belong to this user and must not be writable by others. Its mode is then
    set to 0700.

    Returns:
      None if the folder is private to this user, otherwise the reason why it cannot be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(path) as folder:
            os.fchmod(folder, 0o700)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    """Open a folder and yield its file descriptor.

    The descriptor refers to the checked folder even if the path is replaced later.

    Raises:
      OSError: the folder is missing, is a symbolic link, belongs to another user, or is writable
        by others.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check(os.fstat(folder), "the folder")
        yield folder
    finally:
        os.close(folder)


def _check(found: os.stat_result, what: str) -> None:
    if found.st_uid != os.geteuid():
        raise PermissionError(0, f"{what} belongs to user {found.st_uid}, not to this user")
    if found.st_mode & _OTHERS:
        raise PermissionError(0, f"{what} is writable by other users (mode "
                                 f"{stat.S_IMODE(found.st_mode):o}); remove their write "
                                 "permission")


class OwnFolder:
    """A folder with mode 0700 and a size limit; the least recently used files are removed first.

    Each file contains a SHA-256 hash of its name and content, so damaged and misnamed files are
    detected. The hash does not protect against deliberate changes by the folder's owner.

    Attributes:
      path: the folder, created when the first file is written.
      limit: the maximum total size of the files in bytes.
    """

    def __init__(self, path: pathlib.Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def read(self, name: str) -> bytes | None:
        """Read a file and record the time of access.

        Returns:
          The content, or None if the file is missing, cannot be read, is not private, is larger
          than the folder's limit, or is damaged. A warning is logged unless the file is missing.
        """
        try:
            with _opened(self.path) as folder:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                               dir_fd=folder)
                with open(file, "rb") as opened:
                    found = os.fstat(file)
                    _check(found, "the file")
                    if not stat.S_ISREG(found.st_mode) or found.st_size > self.limit:
                        raise OSError(0, "not a regular file, or larger than the folder's limit")
                    data = opened.read(found.st_size)
                    os.utime(file)  # `_prune` sorts files by this time
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("%s: the file is not used (%s)", self.path / name, error.strerror or error)
            return None
        head = len(_MAGIC) + hashlib.sha256().digest_size
        content = data[head:]
        if data[:head] != _MAGIC + _digest(name, content):
            _LOG.warning("%s: the file is damaged and will be replaced", self.path / name)
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file; remove the least recently used files if the folder exceeds its limit.

        A failure, such as a full disk, is logged as a warning and raises no error.
        """
        if (reason := private(self.path)) is not None:
            _LOG.warning("%s: the file was not written (%s)", name, reason)
            return
        temporary = f"{name}.{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            with _opened(self.path) as folder:
                file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
                               0o600, dir_fd=folder)
                try:
                    with open(file, "wb") as opened:
                        opened.write(_MAGIC + _digest(name, content) + content)
                    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
                self._prune(folder)
        except OSError as error:
            _LOG.warning("%s: the file was not written (%s)", self.path / name,
                         error.strerror or error)

    def _prune(self, folder: int) -> None:
        """Remove the least recently used files until the total size is within the limit."""
        with os.scandir(folder) as entries:
            held = []
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # if another process has removed it
                    if entry.is_file(follow_symlinks=False):
                        held.append((entry.stat(follow_symlinks=False), entry.name))
        total = sum(found.st_size for found, _ in held)
        for found, name in sorted(held, key=lambda x: x[0].st_mtime_ns):
            if total <= self.limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            total -= found.st_size


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
