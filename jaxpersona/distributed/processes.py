"""Multi-process execution: initialization, process index and collectives on the host.

Every process runs the same programs in the same order on its own devices, and writes the files for
its share of the work items. With a single process, these functions do not communicate. Callers may
also initialize `jax.distributed` themselves instead of calling `start`.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from jaxpersona.brief import shown
from jaxpersona.errors import UserError
from jaxpersona.runtime import default_setting, setting

T = TypeVar("T")
_ASYNC = "jax_cpu_enable_async_dispatch"
_HEARTBEAT = 30  # a process is considered dead after this many seconds without a heartbeat


def start(coordinator: str | None = None, count: int | None = None,
          index: int | None = None) -> None:
    """Initialize `jax.distributed`; call this before creating any array.

    Give all three arguments or none. If `jax.distributed` is already initialized, `start` only
    checks the arguments, including that `count` and `index` agree with that initialization.

    Args:
      coordinator: the address host:port of process 0. If None, the address is detected, which
        requires an environment that JAX recognizes, such as SLURM, Open MPI, Kubernetes or a
        TPU pod.
      count, index: the number of processes and the index of this process. If None, both are
        detected.

    Raises:
      UserError: arguments are missing, invalid or inconsistent with an earlier initialization, or
        `jax.distributed` cannot be initialized, for example because no cluster is detected.
    """
    given = (coordinator is not None, count is not None, index is not None)
    if any(given) and not all(given):
        raise UserError("the coordinator, the process count or the process index is missing; give "
                        "all three, or omit all three where JAX detects the processes, such as on "
                        "SLURM, Open MPI, Kubernetes or a TPU pod")
    for name, value in (("process count", count), ("process index", index)):
        if value is not None and not isinstance(value, int):
            raise UserError(f"the {name} is {shown(value, 60)}; it must be an integer")
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"the process index is {index}; it must be in 0…{count - 1}")
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", str(coordinator)):
        raise UserError(f"coordinator is {coordinator!r}; give host:port of process 0")
    if joined():
        there = jax.process_count(), jax.process_index()
        if all(given) and there != (count, index):
            raise UserError(f"the process count is {count} and the process index is {index}, but "
                            "jax.distributed is already initialized with process count "
                            f"{there[0]} and process index {there[1]}; omit the coordinator, the "
                            "count and the index")
        return
    try:
        # on CPUs, two programs with cross-process collectives can deadlock if they run concurrently
        with default_setting(_ASYNC, False, default=True):
            jax.distributed.initialize(coordinator, count, index,
                                       heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"jax.distributed cannot be initialized ({reason}): give the coordinator, "
                        "the process count and the process index, or correct them") from error


def joined() -> bool:
    """Return whether `jax.distributed` is initialized, without initializing a backend."""
    return jax.distributed.is_initialized()


def many() -> bool:
    """Return whether there are several processes; this call initializes JAX's backend."""
    return jax.process_count() > 1


def warn_of_deadlock() -> None:
    """Warn if several CPU processes use asynchronous dispatch, which can cause a deadlock."""
    if not many() or jax.local_devices()[0].platform != "cpu":
        return
    if setting(_ASYNC):
        warnings.warn("several processes run on CPUs with asynchronous dispatch and may "
                      f"deadlock: call jax.config.update({_ASYNC!r}, False) before creating "
                      "the first array", stacklevel=3)


def first() -> bool:
    """Return whether this is process 0, which prints output and writes shared files."""
    return not many() or jax.process_index() == 0


def index() -> int:
    """Return the zero-based index of this process."""
    return jax.process_index()


def owns(i: int) -> bool:
    """Return whether work item i belongs to this process (i mod process count = process index)."""
    return not many() or i % jax.process_count() == jax.process_index()


def fetch(tree: Any) -> Any:
    """Return a pytree with its JAX arrays as complete NumPy arrays.

    The shards of other processes are copied too. All processes must call this function.
    """
    leaves, structure = jax.tree.flatten(tree)
    remote = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)
           and not (x.is_fully_addressable or x.is_fully_replicated)]
    if remote:
        from jax.experimental import multihost_utils

        gathered = multihost_utils.process_allgather([leaves[i] for i in remote], tiled=True)
        for i, x in zip(remote, gathered, strict=True):
            leaves[i] = x
    return structure.unflatten(jax.device_get(leaves))


def total(values: np.ndarray) -> np.ndarray:
    """Sum an integer array over all processes; all processes must call this function.

    Integer overflow wraps around, so the sum does not depend on how the terms are distributed over
    processes.
    """
    from jax.experimental import multihost_utils

    every = np.asarray(multihost_utils.process_allgather(values))
    return every.reshape(-1, *values.shape).sum(0, dtype=values.dtype)


def merge(items: Mapping[str, T]) -> dict[str, T]:
    """Merge the dicts of all processes into one dict; all processes must call this function.

    The values must be picklable. If several dicts have a key, the process with the largest index
    determines its value.
    """
    if not many():
        return dict(items)
    from jax.experimental import multihost_utils

    message = np.frombuffer(pickle.dumps(dict(items)), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([message.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: message.size] = message
    messages = multihost_utils.process_allgather(padded)
    out: dict[str, T] = {}
    for size, data in zip(sizes.reshape(-1), messages, strict=True):
        out |= pickle.loads(data[: int(size)].tobytes())
    return out


def in_turn(act: Callable[[], T]) -> T:
    """Call `act` first on process 0 and then on the other processes; return its result.

    This order prevents races, for example when processes create a shared folder. All processes must
    call this function.
    """
    if not many():
        return act()
    if not first():
        merge({})  # a barrier: wait until process 0 has called `act`
    try:
        return act()
    finally:  # also after an error, because the other processes wait at the same barriers
        if first():
            merge({})
        merge({})


def leave(code: int) -> NoReturn:
    """Exit with `code` immediately, because JAX's shutdown would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
