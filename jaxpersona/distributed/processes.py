"""Run one program in several processes: which one this is, and what they exchange.

All processes compute the same programs in the same order, each on its own devices; each keeps the
files of its own share of the work. With one process, nothing here does anything. How many processes
there are is JAX's answer, whoever initialised `jax.distributed`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

T = TypeVar("T")
_ASYNC = "jax_cpu_enable_async_dispatch"
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead


def start(coordinator: str | None = None, count: int | None = None,
          index: int | None = None) -> None:
    """Join the other processes, before any array is made.

    If `jax.distributed` is initialised already, this only checks that the arguments agree with it.

    Args:
      coordinator: host:port of process 0; None where SLURM, Kubernetes or a TPU pod says it.
      count, index: how many processes there are, and which one this is; likewise.

    Raises:
      ValueError: settings of which some are missing or out of range, settings that contradict an
        earlier initialisation, or no cluster that says them.
    """
    given = (coordinator is not None, count is not None, index is not None)
    if any(given) and not all(given):
        raise ValueError("coordinator, processes and process belong together: give all three, or "
                         "none on SLURM, Kubernetes or a TPU pod")
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"process is {index}; it must lie in 0…{count - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator is {coordinator!r}; write host:port of process 0")
    if joined():
        there = jax.process_count(), jax.process_index()
        if all(given) and there != (count, index):
            raise ValueError(f"processes is {count} and process is {index}, but jax.distributed is "
                             f"initialised already, with {there[0]} and {there[1]}: leave them out")
        return
    # programs that sum over processes deadlock on a CPU if two of them run side by side
    jax.config.update(_ASYNC, False)
    try:
        jax.distributed.initialize(coordinator, count, index,
                                   heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the processes cannot be joined ({reason}): name coordinator, processes "
                         "and process") from None


def joined() -> bool:
    """Whether `jax.distributed` is initialised; unlike `many`, this initialises no back end."""
    return jax.distributed.is_initialized()


def many() -> bool:
    """Whether this is one process of several. It initialises JAX's back end."""
    return jax.process_count() > 1


def warn_of_deadlock() -> None:
    """Warn where several processes run on CPUs with asynchronous dispatch, which can deadlock."""
    if not many() or jax.local_devices()[0].platform != "cpu":
        return
    with contextlib.suppress(AttributeError, KeyError):  # a version without the setting
        if jax.config.read(_ASYNC):
            warnings.warn("several processes run on CPUs with asynchronous dispatch and may "
                          f"deadlock: call jax.config.update({_ASYNC!r}, False) before the first "
                          "array is made", stacklevel=3)


def first() -> bool:
    """Whether this is the process that speaks for all."""
    return not many() or jax.process_index() == 0


def index() -> int:
    """Return which process this is, from 0."""
    return jax.process_index()


def owns(i: int) -> bool:
    """Whether piece i of the work is this process's share to keep."""
    return not many() or i % jax.process_count() == jax.process_index()


def fetch(tree: Any) -> Any:
    """Bring arrays to the host, whole, wherever they lie; all processes must call it together."""
    leaves, structure = jax.tree.flatten(tree)
    far = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)
           and not (x.is_fully_addressable or x.is_fully_replicated)]
    if far:
        from jax.experimental import multihost_utils

        for i, x in zip(far, multihost_utils.process_allgather([leaves[i] for i in far],
                                                               tiled=True), strict=True):
            leaves[i] = x
    return structure.unflatten(jax.device_get(leaves))


def total(mine: np.ndarray) -> np.ndarray:
    """Sum an array of integers over all processes, which must call it together.

    It wraps around as its dtype does, and is the same however the terms are distributed.
    """
    from jax.experimental import multihost_utils

    every = np.asarray(multihost_utils.process_allgather(mine))
    return every.reshape(-1, *mine.shape).sum(0, dtype=mine.dtype)


def merge(mine: Mapping[str, T]) -> dict[str, T]:
    """Join what each process knows into one table; all processes must call it together."""
    if not many():
        return dict(mine)
    from jax.experimental import multihost_utils

    message = np.frombuffer(pickle.dumps(dict(mine)), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([message.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: message.size] = message
    parts = multihost_utils.process_allgather(padded)
    out: dict[str, T] = {}
    for size, part in zip(sizes.reshape(-1), parts, strict=True):
        out |= pickle.loads(part[: int(size)].tobytes())
    return out


def in_turn(act: Callable[[], T]) -> T:
    """Let process 0 act first and the others after it, as where one makes a folder for all."""
    if not many():
        return act()
    found = act() if first() else None
    merge({})  # the others wait here
    if not first():
        found = act()
    merge({})
    return found  # pyright: ignore[reportReturnType]


def leave(code: int) -> NoReturn:
    """End this process at once, without waiting for others that may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
