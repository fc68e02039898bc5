"""The on-disk caches of programs, so that a second process neither traces nor compiles.

JAX's compilation cache holds executables, and `stored` holds traces. Both are in one folder of the
user's cache folder, of mode 0700 (`own_folder`).
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
TRACES, EXECUTABLES = 2**28, 2**32  # the maximum sizes of the folders in bytes
_SHORTEST = 0.05  # seconds; executables that compile faster are not stored
_LOG = logging.getLogger("jaxpersona")


def use_compile_cache() -> str | None:
    """Enable JAX's compilation cache in the user's cache folder, unless it already has a folder.

    `JAXPERSONA_COMPILE_CACHE=0` disables this; `JAX_COMPILATION_CACHE_DIR` or
    `jax_compilation_cache_dir` sets another folder. A folder that belongs to another user, is a
    symbolic link or may be written by others is not used, with a warning.

    Returns:
      The cache folder; None if disabled, or if the user has no home folder or no folder of their
      own.
    """
    configured = setting("jax_compilation_cache_dir")
    if configured or os.environ.get(SWITCH, "1") == "0":
        return configured
    folder = _own()
    if folder is None:
        return None
    # a new folder: JAX cannot limit the size of one that it filled without a limit
    folder = folder / "executables"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value, default in (
            ("jax_persistent_cache_min_compile_time_secs", _SHORTEST, 1.0),
            ("jax_compilation_cache_max_size", EXECUTABLES, -1)):
        with default_setting(name, value, default=default):
            pass
    return str(folder)


def traces() -> OwnFolder | None:
    """Return the folder of traces; None if it is disabled or there is none (`use_compile_cache`).

    Executables come from JAX's cache, so without that cache there are no traces either.
    """
    if os.environ.get(SWITCH, "1") == "0" or not setting("jax_compilation_cache_dir"):
        return None
    folder = _own()
    return None if folder is None else OwnFolder(folder / "traces", TRACES)


def _own() -> pathlib.Path | None:
    """Return this user's folder for this processor, created if missing; None if there is none."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # no HOME and no entry in the user database, as in containers
        return None
    above = pathlib.Path(base) / "jaxpersona"
    for folder in (above, above / _processor()):
        if (reason := private(folder)) is not None:
            _LOG.warning("compiled programs are not kept: %s", reason)
            return None
    return above / _processor()


def _processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Return a name of the processor's instruction set.

    A program compiled for one processor may not run on another that shares the folder.
    """
    try:
        lines = pathlib.Path(cpuinfo).read_text("utf-8", "replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
