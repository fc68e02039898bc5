"""Loading a sharded checkpoint: peak memory, and speed against reading the same files raw.

    python bench/load.py [--gigabytes 2] [--rounds 3] [--dtype bfloat16]

Writes a synthetic bfloat16 checkpoint into a temporary folder. Rounds alternate, each in a process
of its own, a raw read with `ckpts.hf.load`, so that both meet the same state of the disk cache; the
first round is a warm-up. What the figures are:

- `speed_over_raw`: seconds of a raw read over seconds of the load. The raw read is `read_bytes` of
  every file, kept until the last is read: what a loader is there for is to *keep* the weights, so
  a fair rival fills new memory too. This is the figure to hold a loader to.
- `kept_over_raw`: the same by bytes that are kept a second. It differs where the load widens: from
  bfloat16 to float32 it fills twice the memory that the raw read does.
- `speed_over_buffer`: against a read through one reused buffer of 16 MiB, which keeps nothing. No
  loader can come near it; it shows what new memory costs on the machine.

Every process asks for pages of the ordinary size (`NUMPY_MADVISE_HUGEPAGE=0`). NumPy would take
huge ones, for the load alone, and on a virtual machine that hands freed memory back to its host
just these must be fetched anew: a tenth of the speed, by chance. A load also watches its process's
resident memory from after its imports.

Prints a card, then one line of JSON.
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
    """Return a Qwen 3 whose bfloat16 parameters take about so many GB."""
    from jaxpersona.models.config import replace
    from jaxpersona.models.presets import preset

    base = replace(preset("qwen3-0.6b"), vocab_size=32_000)
    one, two = (replace(base, n_layers=n).bytes(2) for n in (1, 2))
    return replace(base, n_layers=max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1))


def write(folder: pathlib.Path, config: Any, shard_bytes: float) -> None:
    """Write random bfloat16 parameters of a shape, as shards and their index."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jaxpersona.ckpts import hf

    from jaxpersona.models.params import layout

    draw = np.random.default_rng(0)

    def value(spec: Any) -> Any:
        # random bits with an exponent far from NaN: fast to draw, and nothing compresses them
        bits = draw.integers(0, 2**16, spec.shape, np.uint16) & np.uint16(0xBFFF)
        return bits.view(jnp.bfloat16)

    hf.save(folder, jax.tree.map(value, layout(config)), config, shard_bytes=shard_bytes)


def raw(folder: pathlib.Path) -> dict[str, Any]:
    """Read every file of weights into new memory and keep it: seconds and bytes."""
    started = time.perf_counter()
    held = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return {"seconds": time.perf_counter() - started, "bytes": sum(map(len, held))}


def buffered(folder: pathlib.Path) -> dict[str, Any]:
    """Read every file of weights through one buffer: seconds and bytes."""
    buffer = memoryview(bytearray(1 << 24))
    total, started = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"seconds": time.perf_counter() - started, "bytes": total}


def load(folder: pathlib.Path, dtype: str) -> dict[str, Any]:
    """Load the folder: seconds, bytes of the parameters, peak resident memory above the start."""
    import jax
    import jax.numpy as jnp
    from jaxpersona.ckpts import hf

    jax.block_until_ready(jax.device_put(jnp.zeros(8)))  # the back end's own memory is not ours
    with Peak() as peak:
        started = time.perf_counter()
        params = jax.block_until_ready(hf.load(folder, dtype=jnp.dtype(dtype)))
        seconds = time.perf_counter() - started
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return {"seconds": seconds, "bytes": size, "peak_bytes": peak.above}


def total_bytes(folder: pathlib.Path) -> int:
    """Return the size of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
            said = []
            for kind, runs in rounds.items():
                done = subprocess.run([*command, kind, name], check=True, stdout=subprocess.PIPE,
                                      text=True, env=pages)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                said.append(f"{kind} {total_bytes(folder) / runs[-1]['seconds'] / 1e9:.2f} GB/s")
            print(f"{'warm-up' if turn == 0 else f'round {turn}'}: {', '.join(said)}", flush=True)
        total = total_bytes(folder)
    seconds = {kind: [run["seconds"] for run in runs[1:]] for kind, runs in rounds.items()}
    peaks = [run["peak_bytes"] / run["bytes"] for run in rounds["load"][1:]]

    def speed(against: str) -> float:
        """Median over rounds: how fast the load is against another way to read."""
        pairs = zip(seconds[against], seconds["load"], strict=True)
        return round(statistics.median(other / mine for other, mine in pairs), 4)

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
