"""Measure each process's peak memory when several processes load a checkpoint together.

    python bench/load_sharded.py [--gigabytes 6] [--processes 2] [--devices 4] [--dtype bfloat16]

The benchmark writes a synthetic bfloat16 checkpoint to a temporary folder. Several processes load
it with `ckpts.hf.load` onto one mesh of simulated CPU devices (the axis "fsdp" across processes,
the axis "model" within each process). Each process measures the peak increase of its resident
memory during the load. The benchmark reports the ratio of this increase to the size of the
process's shards plus the largest tensor. The output is a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import Peak, report
from load import shape, total_bytes, write


def load(folder: pathlib.Path, dtype: str, count: int, index: int, port: int) -> dict[str, Any]:
    """Load this process's shards; return the seconds and sizes in bytes.

    The sizes are those of the shards, the data read and the largest tensor, and the peak memory
    increase.
    """
    import jax
    import jax.numpy as jnp
    from jaxpersona.ckpts import hf, tensorfile

    from jaxpersona.distributed import processes
    from jaxpersona.distributed.sharding import make_mesh

    processes.start(f"127.0.0.1:{port}", count, index)
    mesh = make_mesh(fsdp=count, model=jax.local_device_count())
    jax.block_until_ready(jax.device_put(jnp.zeros(8), jax.local_devices()[0]))
    whole, read = tensorfile.read_slice, [0]

    def counted(entry: Any, slices: Any = ()) -> Any:
        values = whole(entry, slices)
        read[0] += values.nbytes
        return values

    tensorfile.read_slice = counted
    with Peak() as peak:
        started = time.perf_counter()
        params = jax.block_until_ready(hf.load(folder, dtype=jnp.dtype(dtype), mesh=mesh))
        seconds = time.perf_counter() - started
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    return {"seconds": seconds, "held_bytes": held, "read_bytes": read[0],
            "largest_tensor": max(x.nbytes for x in leaves), "peak_bytes": peak.above}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="number of devices per process")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, index, port = pathlib.Path(given.one[0]), int(given.one[1]), int(given.one[2])
        print(json.dumps(load(folder, given.dtype, given.processes, index, port)), flush=True)
        return
    config = shape(given.gigabytes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={given.devices}"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, config, given.gigabytes * 1e9 / 4)
        total = total_bytes(folder)
        command = [sys.executable, __file__, "--dtype", given.dtype,
                   "--processes", str(given.processes)]
        workers = [subprocess.Popen([*command, "--one", name, str(index), str(port)], env=env,
                                    stdout=subprocess.PIPE, text=True)
                   for index in range(given.processes)]
        outputs = [worker.communicate()[0] for worker in workers]
    results = [json.loads(text.splitlines()[-1]) for text in outputs]
    ratios = [one["peak_bytes"] / (one["held_bytes"] + one["largest_tensor"]) for one in results]
    for index, one in enumerate(results):
        print(f"process {index}: read {one['read_bytes'] / 1e9:.2f} of {total / 1e9:.2f} GB, holds "
              f"{one['held_bytes'] / 1e9:.2f} GB, peak memory {one['peak_bytes'] / 1e9:.2f} GB ("
              f"{ratios[index]:.3f} × (shards + largest tensor)), {one['seconds']:.1f} s")
    report(
        "load_sharded", f"synthetic {config.family}, {config.n_layers} layers", given,
        file_bytes=total, processes=results, peak_ratios=[round(x, 4) for x in ratios],
        peak_over_held_and_largest=round(max(ratios), 4),
    )


if __name__ == "__main__":
    main()
