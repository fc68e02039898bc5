"""Measure how the memory of a prefill grows with the length of the prompt.

    python bench/prefill_memory.py [--model qwen3-0.6b] [--lengths 1024 2048 4096 8192]

Each length runs in its own process with random weights: one row is prefilled into a cache of that
length, and the logits of the last token are computed. The benchmark reports two sizes without the
weights: the memory of the compiled program (temporaries and outputs, including the cache, according
to `memory_analysis()`) and, for prompts of at most `--run-to` tokens, the peak increase of
resident memory when the program runs. The output is a table and one JSON line.

The default dtype is float32. With bfloat16, XLA on CPU would convert the weights to float32, and
the fixed size of this copy would mask some of the growth with length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from common import Peak, report


def measure(model: str, length: int, dtype: str, run: bool) -> dict[str, Any]:
    """Compile a prefill of `length` tokens and return its memory in bytes.

    If `run` is true, also run it and return the seconds and the peak increase of resident memory.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpersona.models.batch import batch
    from jaxpersona.models.forward import forward
    from jaxpersona.models.params import abstract_params, init_params
    from jaxpersona.models.presets import preset

    config = preset(model)
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, length)
    rows = batch([tokens])
    params = (init_params(config, jax.random.key(0), jnp.dtype(dtype)) if run
              else abstract_params(config, jnp.dtype(dtype)))

    def prefill(params: Any, rows: Any) -> Any:
        out = forward(params, config, rows, logits="last", slots=length)
        return out.logits, out.cache

    program = jax.jit(prefill).lower(params, rows).compile()
    memory = program.memory_analysis()
    if memory is None:
        raise SystemExit("this JAX backend reports no memory statistics for compiled programs")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--run-to", type=int, default=1 << 30,
                        help="the longest prompt to run; longer prefills are only compiled")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.model, given.one, given.dtype, given.one <= given.run_to)))
        return
    rows = []
    for length in given.lengths:
        command = [sys.executable, __file__, "--model", given.model, "--dtype", given.dtype,
                   "--one", str(length), "--run-to", str(given.run_to)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row["program_bytes"] = row["temp_bytes"] + row["output_bytes"]
        rows.append(row)
        ran = (f", resident {row['resident_bytes'] / 2**20:.0f} MiB, {row['seconds']} s"
               if "resident_bytes" in row else "")
        print(f"{length:>6} tokens: program {row['program_bytes'] / 2**20:.0f} MiB without the "
              f"weights{ran}", flush=True)
    first, last = rows[0], rows[-1]
    ran = [row for row in rows if "resident_bytes" in row]
    out: dict[str, Any] = {
        "rows": rows, "growth_of_tokens": last["tokens"] / first["tokens"],
        "ratio_program": round(last["program_bytes"] / first["program_bytes"], 3)}
    if len(ran) > 1:
        out["resident_growth_of_tokens"] = ran[-1]["tokens"] / ran[0]["tokens"]
        out["ratio_resident"] = round(ran[-1]["resident_bytes"] / ran[0]["resident_bytes"], 3)
    report("prefill_memory", given.model, given, **out)


if __name__ == "__main__":
    main()
