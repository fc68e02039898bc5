"""What every bench shares: paired runs with a stopping rule, the machine's limits, a card, one JSON
line.

Machines are noisy, so two arms are compared by the ratios of alternating pairs, and pairs are taken
until the bootstrap 95 % interval of the median ratio is narrow, or a limit is reached. An interval
wider than `WIDTH` (of the ratio, where that is above 1) is unresolved: it passes nothing. In a pair
each arm runs for about `LONG` seconds, in many short turns where its call is short: they alternate
faster than other programs come and go. An interval is that of its own moment; to stop at the first
narrow one makes it cover the truth somewhat less often than 95 %.
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
LONG = 2.0  # seconds of each arm in a pair, about; less where the budget is small
_HIDDEN = ("one", "side", "out")  # arguments of a bench to its own processes
_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "transformers", "torch")


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median ratio."""
    rng = np.random.default_rng(0)
    values = np.asarray(ratios)
    medians = np.median(rng.choice(values, (draws, values.size)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def paired(arms: dict[str, Callable[[], float]], baseline: str, *, pairs: int = 200,
           least: int = 10, budget: float = 150.0,
           judged: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run every arm in turn, again and again, and compare each with the baseline.

    Args:
      arms: name → a call that returns its own seconds.
      baseline: the arm that the ratios are taken over.
      pairs: the most rounds, but `least` are always taken.
      budget: seconds after which no round is begun, `least` apart. Where it is too little for that
        many rounds of `LONG` seconds an arm, the rounds are shorter.
      judged: the arms that must be resolved before it ends; every one by default.

    Returns:
      For each arm, the baseline too: ratio (the median over rounds of the baseline's seconds / its
      own, so that 1 is as fast and less is slower), interval, unresolved, pairs, seconds (of a
      call: the median over rounds of a round's median).
    """
    long = min(LONG, budget / (least * len(arms)))
    turns = {}
    for name, arm in arms.items():
        arm()  # warm up
        once = arm()
        if once < long:  # the shorter of two, where it decides how many
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
    """Call every arm as often as `turns` says, evenly interleaved; return each one's median, which
    a stall of a few calls does not move."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sum(turns.values())):
        behind = min(arms, key=lambda name: (len(spent[name]) + 0.5) / turns[name])
        spent[behind].append(arms[behind]())
    return {name: statistics.median(found) for name, found in spent.items()}


def machine() -> dict[str, Any]:
    """Describe the device and versions of a measurement."""
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
    """Return the least seconds of a few calls, after one that compiles."""
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - begun)
    return best


def bandwidth(megabytes: int = 256) -> float:
    """Measure the bytes a second at which the device reads its memory."""
    x = jnp.ones((megabytes << 18,), jnp.float32)
    read = jax.jit(jnp.sum)
    return x.nbytes / seconds_of(lambda: read(x))


def peak_flops(dtype: Any, size: int = 2048) -> float:
    """Measure the floating-point operations a second of a large matrix product."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds_of(lambda: multiply(x))


class Peak:
    """The greatest memory inside a `with` block above that at its beginning: the devices' own
    account where they keep one, else the process's resident memory (Linux)."""

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
        known = [device.memory_stats() for device in jax.local_devices()]
        if all(known):
            return _torch_bytes() + sum(found["bytes_in_use"] for found in known if found)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, self._now())
        self.seconds = time.perf_counter() - self.begun

    @property
    def above(self) -> int:
        """Bytes above the beginning."""
        return self.most - self.start


def _torch_bytes() -> int:
    """Return what PyTorch holds of a card's memory."""
    torch: Any = sys.modules.get("torch")
    try:
        return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    except AttributeError:  # not imported, or not to its end yet
        return 0


def report(bench: str, model: Any, arguments: Any, **result: Any) -> None:
    """Print a card of a result, then the result as one JSON line."""
    found = {
        "bench": bench, "model": model if isinstance(model, str) else model.name, **machine(),
        "date": datetime.date.today().isoformat(),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in _HIDDEN}, **result,
    }
    for key, value in found.items():
        print(f"{key:<28}{value}")
    print(json.dumps(found), flush=True)
