"""What surrounds a call: JAX's debugging flags, its guard of transfers, and forked processes.

The package uses NaN for "not read" and infinity for "no bound", and it moves its own numbers to and
from the device. JAX's flags against these are therefore off within its functions, and only there.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

_used_by: int | None = None  # the process that first used JAX through this package
_asked: contextvars.ContextVar[bool | None] = contextvars.ContextVar("debugging", default=None)


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Run the package's own code without `jax_debug_nans`, `jax_debug_infs` and a transfer guard.

    It also decorates a function. Programs and their cache are the same as without these flags.

    Raises:
      ValueError: this process was forked from one that had used JAX.
    """
    check_process()
    before = _asked.set(debugging())
    try:
        with jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False):
            yield
    finally:
        _asked.reset(before)


def debugging() -> bool:
    """Whether the user asks JAX to stop at values that are not finite; within `own_rules` too."""
    asked = _asked.get()
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs) if asked is None else asked


def check_process() -> None:
    """Refuse to run in a child of a process that has used JAX, where JAX's threads are missing.

    Raises:
      ValueError: this process is such a child.
    """
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise ValueError(
            f"process {os.getpid()} was forked from process {_used_by}, which has used JAX; a call "
            "in it would wait for ever: start it by multiprocessing.get_context('spawn')"
        )
