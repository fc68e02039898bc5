"""The on-disk cache of compiled programs, so that a second process compiles nothing."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

from jaxpersona.runtime import default_setting, setting

SWITCH = "JAXPERSONA_COMPILE_CACHE"
_SHORTEST = 0.3  # seconds; programs that compile faster are not stored


def use_compile_cache() -> str | None:
    """Enable JAX's compilation cache in the user's cache folder, unless it already has a folder.

    `JAXPERSONA_COMPILE_CACHE=0` disables this; `JAX_COMPILATION_CACHE_DIR` or
    `jax_compilation_cache_dir` sets another folder.

    Returns:
      The cache folder; None if disabled or if the user has no home folder.
    """
    configured = setting("jax_compilation_cache_dir")
    if configured or os.environ.get(SWITCH, "1") == "0":
        return configured
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # no HOME and no entry in the user database, as in containers
        return None
    folder = str(pathlib.Path(base) / "jaxpersona" / _processor())
    jax.config.update("jax_compilation_cache_dir", folder)
    with default_setting("jax_persistent_cache_min_compile_time_secs", _SHORTEST, default=1.0):
        pass
    return folder


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
