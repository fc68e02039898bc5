"""Compiled programs, of which only the most recently used are kept.

`jax.jit` keeps every program that it ever compiled: about 20 MB of host memory for each new pair of
prompt width and cache size of a small model. Here each shape has a `jit` of its own, and the one
that was not used for the longest time is dropped, which frees its trace and its executable.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from jaxpersona.distributed.sharding import platform, running_on
from jaxpersona.errors import UserError

LIMIT = 64  # programs; prompts of eight widths, with and without a cap, use about as many
SWITCH = "JAXPERSONA_PROGRAMS"
_LOG = logging.getLogger("jaxpersona")


class Kept:
    """The compiled programs of a process, dropped in the order of their last use.

    Attributes:
      limit: the most programs that are kept; None: what `JAXPERSONA_PROGRAMS` says at the first
        program. A wrong value is then an error of that call, not of the import.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[Any, Any] = OrderedDict()
        self.limit = limit

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what is kept under a key, or make it and drop what exceeds the limit."""
        with self._lock:
            if self.limit is None:
                self.limit = _limit()
            found = self._held.pop(key, None)
            if found is None:
                found = make()
            self._held[key] = found
            while len(self._held) > max(self.limit, 1):
                self._held.popitem(last=False)
                _LOG.info("more than %d compiled programs are in use; the least recently used one "
                          "is freed and compiled anew when it is needed (%s sets the limit)",
                          self.limit, SWITCH)
        return found

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._held.clear()


def _limit() -> int:
    said = os.environ.get(SWITCH, "")
    if not said:
        return LIMIT
    if not said.isdecimal() or not 0 < int(said[:9]):
        raise UserError(f"{SWITCH} is {said[:40]!r}; it must be a positive number of programs")
    return int(said[:9])


KEPT = Kept()


def program(*, static: tuple[str, ...] = (),
            donate: tuple[str, ...] = ()) -> Callable[[Callable], Program]:
    """Return a decorator like `jax.jit` whose compiled programs are kept in `KEPT`.

    Args:
      static, donate: names of arguments, as `static_argnames` and `donate_argnames` of `jax.jit`.
    """
    return lambda function: Program(function, static, donate)


class Program:
    """A jitted function with one `jax.jit` for each shape of its arguments.

    The first argument's arrays say which platform the program is for, so that CPU and GPU arrays
    of one shape do not share a trace. Whatever the key leaves out is left to `jax.jit`: it costs
    memory, never correctness.
    """

    def __init__(self, function: Callable, static: tuple[str, ...],
                 donate: tuple[str, ...]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._static, self._donate = function, static, donate

    def __call__(self, *args: Any, **named: Any) -> Any:
        made, where = self._of(args, named)
        with running_on(where):
            return made(*args, **named)

    def lower(self, *args: Any, **named: Any) -> Any:
        """Trace and lower for arguments or their shapes, as `jax.jit(…).lower` does."""
        made, where = self._of(args, named)
        with running_on(where):
            return made.lower(*args, **named)

    def _of(self, args: tuple, named: dict[str, Any]) -> tuple[Any, str]:
        first, *others = args
        head = jax.tree.leaves(first)[:1]
        fixed = {name: value for name, value in named.items() if name in self._static}
        leaves, structure = jax.tree.flatten(
            (head, others, {k: v for k, v in named.items() if k not in fixed}))
        shapes = tuple((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in leaves)
        where = platform(*head)
        key = (self._function, where, structure, shapes, tuple(sorted(fixed.items())))
        return KEPT.get(key, self._jit), where

    def _jit(self) -> Any:
        @functools.wraps(self._function)  # a function of its own: `jit` shares traces by function
        def own(*args: Any, **named: Any) -> Any:
            return self._function(*args, **named)

        return jax.jit(own, static_argnames=self._static, donate_argnames=self._donate)
