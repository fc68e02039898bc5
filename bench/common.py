"""Benchmark utilities: paired timing with a stopping rule, device limits and JSON reports.

Timings are noisy, so two arms (timed calls) are compared by the ratios of their times in
alternating pairs. Pairs are added until the 95 % bootstrap confidence interval of the median ratio
is narrow or a limit is reached. A ratio whose interval is wider than `WIDTH` · max(1, ratio) is
unresolved and supports no claim.

In each pair, each arm runs for about `LONG` seconds. Short calls of the arms are interleaved, so
that background load affects all arms equally. Because measurement stops at the first narrow
interval, the coverage of the interval is slightly below 95 %.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpersona

WIDTH = 0.02
LONG = 2.0  # approximate time in seconds per arm in a pair; less if the budget is small
_HIDDEN = ("one", "side", "out")  # omitted from reports: subprocess arguments, output paths
_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "transformers", "torch")


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap confidence interval of the median ratio."""
    rng = np.random.default_rng(0)
    values = np.asarray(ratios)
    medians = np.median(rng.choice(values, (draws, values.size)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def paired(arms: dict[str, Callable[[], float]], baseline: str, *, pairs: int = 200,
           least: int = 10, budget: float = 150.0,
           judged: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Time all arms in alternating rounds and compare each with the baseline.

    Args:
      arms: name → function that runs the arm once and returns the seconds.
      baseline: the arm whose seconds are the numerator of the ratios.
      pairs: the maximum number of rounds (at least `least`).
      least: the minimum number of rounds.
      budget: the seconds after which no further round starts once `least` rounds are complete. The
        rounds are shorter if `least` rounds of `LONG` seconds per arm would exceed the budget.
      judged: the arms whose ratios must be resolved before measurement stops; default: all.

    Returns:
      For each arm, including the baseline: ratio (median over rounds of baseline seconds / arm
      seconds; below 1 if the arm is slower), interval, unresolved, pairs (the number of rounds),
      and seconds per call (median over rounds of each round's median).
    """
    long = min(LONG, budget / (least * len(arms)))
    turns = {}
    for name, arm in arms.items():
        arm()  # warm up
        once = arm()
        if once < long:  # time a short call again: its seconds determine the number of calls
            once = min(once, arm())
        turns[name] = max(1, math.ceil(long / max(once, 1e-6)))
    begun = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, dict[str, Any]] = {}
    pairs = max(pairs, least)
    for done in range(1, pairs + 1):
        order = arms if done % 2 else dict(reversed(arms.items()))
        for name, spent in turn_about(order, turns).items():
            seconds[name].append(spent)
        late = time.perf_counter() - begun > budget
        if done < least or (done % 5 and done < pairs and not late):
            continue
        for name in arms:
            ratios = [b / a for a, b in zip(seconds[name], seconds[baseline], strict=True)]
            low, high = interval(ratios)
            found[name] = {
                "ratio": round(statistics.median(ratios), 4),
                "interval": [round(low, 4), round(high, 4)],
                "unresolved": high - low > WIDTH * max(1.0, statistics.median(ratios)),
                "pairs": done, "seconds": round(statistics.median(seconds[name]), 6),
            }
        resolved = not any(found[name]["unresolved"] for name in judged or arms if name != baseline)
        if resolved or late:
            break
    return found


def turn_about(arms: dict[str, Callable[[], float]], turns: dict[str, int]) -> dict[str, float]:
    """Call every arm `turns[name]` times, evenly interleaved; return each arm's median seconds.

    The median is not affected by a few slow calls.
    """
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sum(turns.values())):
        behind = min(arms, key=lambda name: (len(spent[name]) + 0.5) / turns[name])
        spent[behind].append(arms[behind]())
    return {name: statistics.median(values) for name, values in spent.items()}


def machine() -> dict[str, Any]:
    """Return the device, the number of CPU cores, the CPU architecture and the package versions."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jaxpersona": jaxpersona.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "versions": versions,
    }


def seconds_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest of `repeats` calls, after a warm-up call that compiles."""
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - begun)
    return best


def bandwidth(megabytes: int = 256) -> float:
    """Measure the device's memory read bandwidth in bytes/s."""
    x = jnp.ones((megabytes << 18,), jnp.float32)
    read = jax.jit(jnp.sum)
    return x.nbytes / seconds_of(lambda: read(x))


def peak_flops(dtype: Any, size: int = 2048) -> float:
    """Measure the FLOP/s of a large matmul with operands of the given dtype."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds_of(lambda: multiply(x))


class Peak:
    """Context manager that records how far memory rises above its value at the start of the block.

    The memory is sampled every 5 ms. If the devices report memory statistics, the sample is the sum
    of their bytes in use and the GPU memory that PyTorch has allocated. Otherwise, it is the
    resident memory of the process (Linux only).
    """

    def __enter__(self) -> Peak:
        self.start = self.most = self._now()
        self.begun = time.perf_counter()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            return _torch_bytes() + sum(each["bytes_in_use"] for each in stats if each)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, self._now())
        self.seconds = time.perf_counter() - self.begun

    @property
    def above(self) -> int:
        """The peak memory minus the memory at the start of the block, in bytes."""
        return self.most - self.start


def _torch_bytes() -> int:
    """Return the bytes of GPU memory allocated by PyTorch; 0 if it has not initialized CUDA."""
    torch: Any = sys.modules.get("torch")
    try:
        return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    except AttributeError:  # torch is not imported, or its import is not complete
        return 0


def report(bench: str, model: Any, arguments: Any, **result: Any) -> None:
    """Print a result, with the machine, date and arguments, as a table and as one JSON line."""
    entries = {
        "bench": bench, "model": model if isinstance(model, str) else model.name, **machine(),
        "date": datetime.date.today().isoformat(),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in _HIDDEN}, **result,
    }
    for key, value in entries.items():
        print(f"{key:<28}{value}")
    print(json.dumps(entries), flush=True)
