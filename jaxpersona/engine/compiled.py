"""A least-recently-used (LRU) cache of compiled programs.

A `jax.jit` object keeps every program that it has compiled. For a small model, the programs for one
padded prompt length and cache size take about 20 MB of host memory. This module therefore creates
one `jax.jit` object per combination of argument shapes. If there are more objects than a limit, the
least recently used one is dropped, which frees its trace and its executable.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxpersona.distributed.sharding import platform, running_on
from jaxpersona.engine.compile_cache import traces
from jaxpersona.engine.stored import Stored
from jaxpersona.errors import UserError

# The default maximum number of compiled programs in memory, enough for eight prompt lengths with
# and without edits.
LIMIT = 64
SWITCH = "JAXPERSONA_PROGRAMS"
_LOG = logging.getLogger("jaxpersona")


class Kept:
    """An LRU cache of compiled programs.

    Attributes:
      limit: the maximum number of programs. If None, it is read from the environment variable
        `JAXPERSONA_PROGRAMS` when the first program is requested, so that an invalid value raises
        an error in that call and not at import. `keeping` can increase the limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[Any, Any] = OrderedDict()
        self._used: list[set[Any]] = []  # the keys requested in each open `keeping` block
        self.limit = limit

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the program for a key, created by `make` on first use.

        If the number of programs then exceeds the limit, the least recently used ones are dropped,
        and a message is logged.
        """
        with self._lock:
            if self.limit is None:
                self.limit = _limit()
            value = self._held.pop(key, None)
            if value is None:
                value = make()
            self._held[key] = value
            for used in self._used:
                used.add(key)
                if not _fixed():
                    self.limit = max(self.limit, len(used))
            while len(self._held) > max(self.limit, 1):
                self._held.popitem(last=False)
                _LOG.info("more than %d compiled programs are in memory; the least recently used "
                          "one is freed and recompiled on its next use (%s sets the limit)",
                          self.limit, SWITCH)
        return value

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Increase the limit, if necessary, to the number of programs requested in a `with` block.

        None of these programs is then dropped within the block. If the environment variable
        `JAXPERSONA_PROGRAMS` is set, the limit does not change, and a warning states the required
        number if it is larger.
        """
        used: set[Any] = set()
        with self._lock:
            self._used.append(used)
        try:
            yield
        finally:
            with self._lock:
                self._used = [other for other in self._used if other is not used]
        if self.limit is not None and len(used) > self.limit:
            warnings.warn(f"warm_up compiled {len(used)} programs, but {SWITCH} is {self.limit}, "
                          "so some were dropped and are recompiled on their next use; set "
                          f"{SWITCH} to at least {len(used)}", stacklevel=4)

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._held.clear()


def _fixed() -> bool:
    """Return whether the environment variable `JAXPERSONA_PROGRAMS` is set."""
    return bool(os.environ.get(SWITCH))


def _limit() -> int:
    """Return the value of the environment variable `JAXPERSONA_PROGRAMS`, or `LIMIT` if unset.

    Raises:
      UserError: the value is not a positive integer.
    """
    value = os.environ.get(SWITCH, "")
    if not value:
        return LIMIT
    if not value.isdecimal() or not 0 < int(value[:99]):
        raise UserError(f"{SWITCH} is {value[:40]!r}; it must be a positive integer, the maximum "
                        "number of compiled programs")
    return int(value[:99])


KEPT = Kept()


def program(*, static: tuple[str, ...] = (), donate: tuple[str, ...] = (),
            result: Callable[..., Any] | None = None) -> Callable[[Callable], Program]:
    """Return a decorator that works like `jax.jit` but keeps compiled programs in `KEPT`.

    Args:
      static, donate: argument names, as for `static_argnames` and `donate_argnames` of `jax.jit`.
      result: a function that takes the same arguments and returns a pytree with the structure of
        the result, without computing the result. If this function is given and the on-disk cache
        is enabled, traces are stored on disk (see `engine.stored`).
    """
    return lambda function: Program(function, static, donate, result)


class Program:
    """A jitted function with one `jax.jit` object per combination of argument shapes.

    Besides shapes, the key of an object contains the arguments' dtypes and pytree structure, the
    static arguments, and the platform and sharding of the first argument's first array, so that
    arrays of the same shape on a CPU, on a GPU and on a mesh do not share a trace. The key omits
    the other arrays of the first argument (usually the parameters), because `jax.jit` and
    `stored.Stored` already distinguish them.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, function: Callable, static: tuple[str, ...], donate: tuple[str, ...],
                 result: Callable[..., Any] | None = None) -> None:
        functools.update_wrapper(self, function)
        self._function, self._static, self._donate = function, static, donate
        self._result = result

    def __call__(self, *args: Any, **named: Any) -> Any:
        jitted, target = self._of(args, named)
        with running_on(target):
            return jitted(*args, **named)

    def lower(self, *args: Any, **named: Any) -> Any:
        """Trace and lower the program for arguments or their shapes, like `jax.jit(…).lower`."""
        jitted, target = self._of(args, named)
        with running_on(target):
            return jitted.lower(*args, **named)

    def _of(self, args: tuple, named: dict[str, Any]) -> tuple[Any, str]:
        """Return the jitted function for these arguments, and the first array's platform."""
        first, *others = args
        head = jax.tree.leaves(first)[:1]
        static = {name: value for name, value in named.items() if name in self._static}
        leaves, structure = jax.tree.flatten(
            (head, others, {k: v for k, v in named.items() if k not in static}))
        shapes = tuple((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in leaves)
        target = platform(*head)
        placed = getattr(head[0], "sharding", None) if head else None
        key = (self._function, target, placed, structure, shapes, tuple(sorted(static.items())))
        return KEPT.get(key, self._jit), target

    def _jit(self) -> Any:
        # a new function object, because `jax.jit` objects of the same function share traces
        @functools.wraps(self._function)
        def function(*args: Any, **named: Any) -> Any:
            return self._function(*args, **named)

        jitted = jax.jit(function, static_argnames=self._static, donate_argnames=self._donate)
        folder = traces() if self._result is not None else None
        if self._result is None or folder is None:
            return jitted
        return Stored(self._function, jitted, static=self._static, donate=self._donate,
                      result=self._result, folder=folder)
