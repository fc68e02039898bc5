"""Runtime context of public calls: JAX's configuration, tracers, debugging checks and forks.

The package uses NaN for "no value" and infinity for "no bound", and transfers small arrays between
host and device. JAX's NaN, inf and transfer checks are therefore disabled inside most public
functions.

Other modules read JAX's configuration only through this module.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.core

from jaxpersona.errors import UserError

_used_by: int | None = None  # the ID of the process that first used JAX through this package

# prefixes of settings that do not affect a trace
_OTHER_SETTINGS = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_debug_log",
                   "jax_logging", "jax_platforms", "jax_traceback", "jax_dump", "jax_explain",
                   "jax_raise_persistent_cache", "jax_enable_compilation_cache", "jax_distributed")
_asked: contextvars.ContextVar[bool | None] = contextvars.ContextVar("debugging", default=None)


class Device(Protocol):
    """A protocol for annotations with `jax.Device`, because JAX's class has no type stubs."""

    @property
    def id(self) -> int: ...

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Disable `jax_debug_nans`, `jax_debug_infs` and the transfer guard inside the context.

    JAX's cache keys do not include these settings, so entering the context causes no
    recompilation.

    Raises:
      UserError: this process was forked from a process that had used JAX.
    """
    check_process()
    before = _asked.set(debugging())
    try:
        with jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False):
            yield
    finally:
        _asked.reset(before)


def debugging() -> bool:
    """Return whether the user has enabled jax_debug_nans or jax_debug_infs.

    The result is the same inside `own_rules`, which disables both.
    """
    asked = _asked.get()
    if asked is not None:
        return asked
    return bool(setting("jax_debug_nans") or setting("jax_debug_infs"))


def is_traced(*trees: Any) -> bool:
    """Return whether any leaf of the trees is a tracer, for example of `jit`, `grad` or `vmap`."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def setting(name: str) -> Any:
    """Return the value of a JAX setting in this thread; None if it is unset or does not exist.

    Args:
      name: a name such as "jax_debug_nans".
    """
    value = getattr(jax.config, name, None)  # a context manager may have changed it in this thread
    if value is None:
        # `read` raises an error for settings that have a context manager or do not exist
        with contextlib.suppress(AttributeError, KeyError):
            value = jax.config.read(name)
    return value


def tracing_settings() -> tuple[tuple[str, str], ...]:
    """Return the JAX settings in this thread that may affect a trace or the result of its program.

    The result has a pair (name, repr of the value) for each setting without a prefix in
    `_OTHER_SETTINGS`.
    """
    return tuple((name, repr(setting(name))) for name in sorted(jax.config.values)
                 if not name.startswith(_OTHER_SETTINGS))


def thread_settings() -> list[Any]:
    """Return the value of each JAX setting in this thread, in a fixed order.

    Settings that a thread cannot override are returned as None. A call takes about 20 µs.
    """
    return [getattr(jax.config, name, None) for name in jax.config.values]


@contextlib.contextmanager
def default_setting(name: str, value: bool | float | str, *,
                    default: bool | float | None = None) -> Iterator[None]:
    """Change a JAX setting that the user has not set; undo the change if the block fails.

    If the block succeeds, the change remains, because JAX may read the setting only later, for
    example when it initializes a backend.

    Args:
      name: a name such as "jax_platforms".
      value: the new value.
      default: JAX's own default. If the current value differs, or the environment variable with
        the setting's name (such as JAX_PLATFORMS) is set, the user's choice is kept.
    """
    before = setting(name)
    if before != default or name.upper() in os.environ:
        yield
        return
    jax.config.update(name, value)
    try:
        yield
    except BaseException:
        jax.config.update(name, before)
        raise


def check_process() -> None:
    """Check that this process was not forked from a process that had used JAX.

    A forked process has no copies of JAX's threads, so JAX can deadlock. The first call records the
    process ID.

    Raises:
      UserError: this process was forked from a process that had used JAX.
    """
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise UserError(
            f"process {os.getpid()} was forked from process {_used_by}, which has used JAX; JAX "
            "can deadlock here: use multiprocessing.get_context('spawn')"
        )
