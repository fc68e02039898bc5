"""Runtime context of public calls: JAX debugging flags, transfer guard and fork check.

The package uses NaN for "no value" and infinity for "no bound", and transfers small arrays between
host and device. JAX's NaN, inf and transfer checks are therefore disabled inside its functions.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

from jaxpersona.errors import UserError

_used_by: int | None = None  # the process that first used JAX through this package
_asked: contextvars.ContextVar[bool | None] = contextvars.ContextVar("debugging", default=None)


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Disable `jax_debug_nans`, `jax_debug_infs` and the transfer guard in a block or function.

    The flags do not change compiled programs or their cache keys.

    Raises:
      UserError: this process was forked from one that has used JAX.
    """
    check_process()
    before = _asked.set(debugging())
    try:
        with jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False):
            yield
    finally:
        _asked.reset(before)


def debugging() -> bool:
    """Return whether the user set jax_debug_nans or jax_debug_infs, also inside `own_rules`."""
    asked = _asked.get()
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs) if asked is None else asked


def check_process() -> None:
    """Raise if this process was forked from one that has used JAX: JAX's threads are missing.

    Raises:
      UserError: this process is such a fork.
    """
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise UserError(
            f"process {os.getpid()} was forked from process {_used_by}, which has used JAX; JAX "
            "would deadlock here: use multiprocessing.get_context('spawn')"
        )
