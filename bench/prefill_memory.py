"""How a prefill's memory grows with its length.

    python -m bench.prefill_memory [--model qwen3-0.6b] [--lengths 1024 2048 4096 8192]

Every length is a process of its own: random weights, one row prefilled into a cache of its length,
logits of the last token. Two figures above the weights: what the compiled program reserves
(`memory_analysis()`: temporaries and outputs, the cache among them), and the peak resident memory
that the system saw between the weights' arrival and the end. Prints a card, then one line of JSON.

float32 is the default because on a CPU XLA widens bfloat16 weights, a constant that would flatter
the ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from typing import Any


def measure(model: str, length: int, dtype: str, run: bool) -> dict[str, Any]:
    """Compile, and where asked run, one prefill of `length` tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpersona.batch import batch
    from jaxpersona.cache import init_cache
    from jaxpersona.model import forward
    from jaxpersona.params import abstract_params, init_params
    from jaxpersona.presets import preset

    config = preset(model)
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, length)
    rows = batch([tokens])
    params = (init_params(config, jax.random.key(0), jnp.dtype(dtype)) if run
              else abstract_params(config, jnp.dtype(dtype)))

    def prefill(params: Any, rows: Any) -> Any:
        cache = init_cache(config, 1, length, dtype)
        out = forward(params, config, rows, logits="last", cache=cache)
        return out.logits, out.cache

    program = jax.jit(prefill).lower(params, rows).compile()
    memory = program.memory_analysis()
    found = {"tokens": length, "temp_bytes": memory.temp_size_in_bytes,
             "output_bytes": memory.output_size_in_bytes}
    if run:
        jax.block_until_ready(params)
        with Peak() as peak:
            started = time.perf_counter()
            jax.block_until_ready(program(params, jax.device_put(rows)))
            found["seconds"] = round(time.perf_counter() - started, 2)
        found["resident_bytes"] = peak.above
    return found


class Peak:
    """The greatest resident memory inside a `with` block above that at its beginning, in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, resident())

    @property
    def above(self) -> int:
        return self.most - self.start


def resident() -> int:
    """Return this process's resident memory in bytes (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--run-to", type=int, default=1 << 30,
                        help="longer prefills are compiled, not run")
    parser.add_argument("--device", default="", help="the machine, in words, for the record")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.model, given.one, given.dtype, given.one <= given.run_to)))
        return
    rows = []
    for length in given.lengths:
        command = [sys.executable, "-m", "bench.prefill_memory", "--model", given.model, "--dtype",
                   given.dtype, "--one", str(length), "--run-to", str(given.run_to)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row["program_bytes"] = row["temp_bytes"] + row["output_bytes"]
        rows.append(row)
        ran = (f", resident {row['resident_bytes'] / 2**20:.0f} MiB, {row['seconds']} s"
               if "resident_bytes" in row else "")
        print(f"{length:>6} tokens: program {row['program_bytes'] / 2**20:.0f} MiB above the "
              f"weights{ran}", flush=True)
    first, last = rows[0], rows[-1]
    ran = [row for row in rows if "resident_bytes" in row]
    out = {
        "bench": "prefill_memory", "model": given.model, "date": given.date,
        "device": given.device, "versions": versions(),
        "arguments": {"lengths": given.lengths, "dtype": given.dtype, "batch": 1},
        "rows": rows, "growth_of_tokens": last["tokens"] / first["tokens"],
        "ratio_program": round(last["program_bytes"] / first["program_bytes"], 3),
    }
    print(f"{out['growth_of_tokens']:.0f} times the tokens, {out['ratio_program']} times the "
          "program's memory")
    if len(ran) > 1:
        out["resident_growth_of_tokens"] = ran[-1]["tokens"] / ran[0]["tokens"]
        out["ratio_resident"] = round(ran[-1]["resident_bytes"] / ran[0]["resident_bytes"], 3)
        print(f"{out['resident_growth_of_tokens']:.0f} times the tokens, "
              f"{out['ratio_resident']} times the resident memory")
    print(json.dumps(out))


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "numpy")}}


if __name__ == "__main__":
    main()
