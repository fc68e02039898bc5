"""On-disk caches of traces and executables, which later processes reuse.

JAX's compilation cache stores executables, and the module `stored` stores traces. By default, both
use subfolders of one folder with mode 0700 in the user's cache folder (`own_folder`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import platform

import jax

from jaxpersona.engine.own_folder import OwnFolder, private
from jaxpersona.runtime import default_setting, setting

SWITCH = "JAXPERSONA_COMPILE_CACHE"
TRACES, EXECUTABLES = 2**28, 2**32  # the maximum sizes of the two folders in bytes
_SHORTEST = 0.05  # minimum compile time, in seconds, for a program to be stored
_LOG = logging.getLogger("jaxpersona")


def use_compile_cache() -> str | None:
    """Enable JAX's compilation cache in the user's cache folder, unless another folder is set.

    `JAXPERSONA_COMPILE_CACHE=0` disables this function; `JAX_COMPILATION_CACHE_DIR` or
    `jax_compilation_cache_dir` sets another folder. If the package's cache folder cannot be
    created, belongs to another user, is a symbolic link or is writable by others, the cache is not
    enabled, and a warning is logged. It is not enabled either if there is neither `XDG_CACHE_HOME`
    nor a home folder.

    If it enables the cache, this function also sets JAX's minimum compilation time for storing an
    executable and the maximum size of the cache, unless the user has set them.

    Returns:
      The folder of JAX's compilation cache, or None if the cache is not enabled.
    """
    configured = setting("jax_compilation_cache_dir")
    if configured or os.environ.get(SWITCH, "1") == "0":
        return configured
    folder = _own()
    if folder is None:
        return None
    # Use a subfolder that contains only executables, because JAX cannot limit the size of a cache
    # folder that was used without a limit before.
    folder = folder / "executables"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value, default in (
            ("jax_persistent_cache_min_compile_time_secs", _SHORTEST, 1.0),
            ("jax_compilation_cache_max_size", EXECUTABLES, -1)):
        with default_setting(name, value, default=default):
            pass
    return str(folder)


def traces() -> OwnFolder | None:
    """Return the folder in which traces are stored, or None if they are not stored.

    Traces are not stored if `JAXPERSONA_COMPILE_CACHE=0`, if the package's cache folder cannot be
    used, or if JAX's compilation cache is disabled, because a stored trace saves time only if its
    executable is cached too.
    """
    if os.environ.get(SWITCH, "1") == "0" or not setting("jax_compilation_cache_dir"):
        return None
    folder = _own()
    return None if folder is None else OwnFolder(folder / "traces", TRACES)


def _own() -> pathlib.Path | None:
    """Return the package's cache folder for this user and processor; create it if necessary.

    Returns:
      The folder, or None if the user has neither `XDG_CACHE_HOME` nor a home folder. The result is
      also None, and a warning is logged, if the folder cannot be created or is not private to the
      user.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor the user database defines a home folder
        return None
    above = pathlib.Path(base) / "jaxpersona"
    for folder in (above, above / _processor()):
        if (reason := private(folder)) is not None:
            _LOG.warning("compiled programs are not stored on disk: %s", reason)
            return None
    return above / _processor()


def _processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Return a folder name that identifies the processor's instruction set.

    An executable for one processor may not run on another. Machines that share a home folder but
    have different processors therefore use different subfolders.
    """
    try:
        lines = pathlib.Path(cpuinfo).read_text("utf-8", "replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
