"""Measure checkpoint loading: peak memory, and speed relative to raw reads of the same files.

    python bench/load.py [--gigabytes 2] [--rounds 3] [--dtype bfloat16]

The benchmark writes a synthetic sharded bfloat16 checkpoint to a temporary folder. Each round runs
a buffered read, a raw read and `ckpts.hf.load` in separate processes, with the files in the page
cache. An additional first round is a warm-up. The results are:

- `speed_over_raw`: the seconds of the raw read / the seconds of the load. The raw read calls
  `read_bytes` on every file and keeps the bytes, because a loader must also allocate memory for
  the weights. This is the main result.
- `kept_over_raw`: the bytes per second that the load keeps in memory / those that the raw read
  keeps. It differs from `speed_over_raw` if the load widens the dtype: float32 parameters take
  twice the bytes of the bfloat16 files.
- `speed_over_buffer`: the seconds of the buffered read / the seconds of the load. The buffered read
  reuses one buffer of 16 MiB. A loader cannot reach its speed, because a loader must also allocate
  memory for the weights.

All processes use ordinary pages (`NUMPY_MADVISE_HUGEPAGE=0`). Without this setting, only the load
would use huge pages, which are up to ten times slower to allocate on virtual machines that return
freed memory to the host. The memory after the imports is subtracted from the peak resident memory.

The output is a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import Peak, report


def shape(gigabytes: float) -> Any:
    """Return a Qwen3 configuration with about `gigabytes` GB of bfloat16 parameters."""
    from jaxpersona.models.config import replace
    from jaxpersona.models.presets import preset

    base = replace(preset("qwen3-0.6b"), vocab_size=32_000)
    one, two = (replace(base, n_layers=n).bytes(2) for n in (1, 2))
    return replace(base, n_layers=max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1))


def write(folder: pathlib.Path, config: Any, shard_bytes: float) -> None:
    """Write a sharded checkpoint with random bfloat16 parameters for a configuration."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jaxpersona.ckpts import hf

    from jaxpersona.models.params import layout

    draw = np.random.default_rng(0)

    def value(spec: Any) -> Any:
        # random bits with the top exponent bit cleared: fast, incompressible and never NaN
        bits = draw.integers(0, 2**16, spec.shape, np.uint16) & np.uint16(0xBFFF)
        return bits.view(jnp.bfloat16)

    hf.save(folder, jax.tree.map(value, layout(config)), config, shard_bytes=shard_bytes)


def raw(folder: pathlib.Path) -> dict[str, Any]:
    """Read every weight file into new memory and return the seconds and the bytes."""
    started = time.perf_counter()
    held = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return {"seconds": time.perf_counter() - started, "bytes": sum(map(len, held))}


def buffered(folder: pathlib.Path) -> dict[str, Any]:
    """Read every weight file through one buffer and return the seconds and the bytes."""
    buffer = memoryview(bytearray(1 << 24))
    total, started = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"seconds": time.perf_counter() - started, "bytes": total}


def load(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
    """Load a checkpoint; return the seconds, the parameter bytes and the peak memory increase."""
    import jax
    import jax.numpy as jnp
    from jaxpersona.ckpts import hf

    jax.block_until_ready(jax.device_put(jnp.zeros(8)))  # initializes the backend
    with Peak() as peak:
        started = time.perf_counter()
        params = jax.block_until_ready(hf.load(folder, dtype=jnp.dtype(dtype)))
        seconds = time.perf_counter() - started
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return {"seconds": seconds, "bytes": size, "peak_bytes": peak.above}


def total_bytes(folder: pathlib.Path) -> int:
    """Return the total size of a folder's weight files in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, folder = given.one[0], pathlib.Path(given.one[1])
        found = (load(folder, given.dtype) if kind == "load" else
                 raw(folder) if kind == "raw" else buffered(folder))
        print(json.dumps(found))
        return
    config = shape(given.gigabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, config, given.gigabytes * 1e9 / 4)
        shards = len(list(folder.glob("*.safetensors")))
        command = [sys.executable, __file__, "--dtype", given.dtype, "--one"]
        pages = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
        rounds: dict[str, list[dict[str, Any]]] = {"buffer": [], "raw": [], "load": []}
        for turn in range(given.rounds + 1):
            speeds = []
            for kind, runs in rounds.items():
                done = subprocess.run([*command, kind, name], check=True, stdout=subprocess.PIPE,
                                      text=True, env=pages)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                speeds.append(f"{kind} {total_bytes(folder) / runs[-1]['seconds'] / 1e9:.2f} GB/s")
            print(f"{'warm-up' if turn == 0 else f'round {turn}'}: {', '.join(speeds)}", flush=True)
        total = total_bytes(folder)
    seconds = {kind: [run["seconds"] for run in runs[1:]] for kind, runs in rounds.items()}
    peaks = [run["peak_bytes"] / run["bytes"] for run in rounds["load"][1:]]

    def speed(against: str) -> float:
        """Return the median over rounds of the seconds of `against` / the seconds of the load."""
        pairs = zip(seconds[against], seconds["load"], strict=True)
        return round(statistics.median(other / ours for other, ours in pairs), 4)

    widened = rounds["load"][0]["bytes"] / total
    report(
        "load", f"synthetic {config.family}, {config.n_layers} layers", given,
        file_bytes=total, files=shards, parameter_bytes=rounds["load"][0]["bytes"],
        seconds={kind: [round(x, 4) for x in values] for kind, values in seconds.items()},
        peak_ratios=[round(x, 4) for x in peaks], peak_over_size=round(max(peaks), 4),
        speed_over_raw=speed("raw"), kept_over_raw=round(speed("raw") * widened, 4),
        speed_over_buffer=speed("buffer"),
    )


if __name__ == "__main__":
    main()
