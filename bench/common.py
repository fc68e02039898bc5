"""What every bench shares: a model to run, paired runs with a stopping rule, a card, one JSON line.

Machines are noisy, so two arms are compared by the ratios of alternating pairs, and pairs are taken
until the bootstrap 95 % interval of the median ratio is narrow, or a limit is reached. An interval
wider than `WIDTH` is unresolved: it passes nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

WIDTH = 0.02
_PACKAGES = ("jax", "jaxlib", "jaxpersona", "numpy")


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median ratio."""
    rng = np.random.default_rng(0)
    values = np.asarray(ratios)
    medians = np.median(rng.choice(values, (draws, values.size)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def paired(arms: dict[str, Callable[[], float]], baseline: str, *, pairs: int,
           least: int = 5) -> dict[str, dict[str, Any]]:
    """Run every arm in turn, again and again, and compare each with the baseline.

    Args:
      arms: name → a call that returns its own seconds.
      baseline: the arm that the ratios are taken over.
      pairs: the most rounds; at least `least` are taken.

    Returns:
      For each other arm: ratio (the median of baseline seconds / its seconds, so that 1 is as fast
      and less is slower), interval, unresolved, pairs.
    """
    for arm in arms.values():
        arm()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, dict[str, Any]] = {}
    for done in range(1, pairs + 1):
        for name, arm in arms.items():
            seconds[name].append(arm())
        if done < least:
            continue
        for name in arms:
            ratios = [b / a for a, b in zip(seconds[name], seconds[baseline], strict=True)]
            low, high = interval(ratios)
            found[name] = {
                "ratio": round(statistics.median(ratios), 4),
                "interval": [round(low, 4), round(high, 4)], "unresolved": high - low > WIDTH,
                "pairs": done, "seconds": round(statistics.median(seconds[name]), 4),
            }
        if not any(arm["unresolved"] for name, arm in found.items() if name != baseline):
            break
    return found


def machine() -> dict[str, Any]:
    """Describe the device and versions of a measurement."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }


def report(result: dict[str, Any]) -> None:
    """Print a card of a result, then the result as one JSON line."""
    for key, value in result.items():
        print(f"{key:<28}{value}")
    print(json.dumps(result), flush=True)
