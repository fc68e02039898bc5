"""Keep compiled programs on disk, so that the second start of a program compiles nothing."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

SWITCH = "JAXPERSONA_COMPILE_CACHE"
_SHORTEST = 0.3  # seconds of compiling that are worth a file


def use_compile_cache() -> str | None:
    """Keep compiled programs in the user's cache folder, unless a folder is chosen already.

    `JAXPERSONA_COMPILE_CACHE=0` turns it off; `JAX_COMPILATION_CACHE_DIR` or
    `jax_compilation_cache_dir` chooses another folder.

    Returns:
      The folder in use, or None: turned off, or the user has no home folder.
    """
    chosen = jax.config.jax_compilation_cache_dir
    if chosen or os.environ.get(SWITCH, "1") == "0":
        return chosen
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # HOME is not set and the system does not know the user, as in containers
        return None
    folder = str(pathlib.Path(base) / "jaxpersona" / _processor())
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return folder


def _processor(described: str = "/proc/cpuinfo") -> str:
    """Name the processor: a program made for one may not run on another that shares the folder."""
    try:
        lines = pathlib.Path(described).read_text("utf-8", "replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
