"""Benchmark one GPU in one process: decode, caps, extraction, matmuls and kernel profiles.

    python bench/gpu.py --parts limits decode32 decode1 --out bench/results
    python bench/gpu.py --model mini --dtype float32 --small        # smoke test on a CPU

To save GPU time, the model is loaded once, and the decode and prefill programs of a part are
compiled in parallel threads. At the end of each part, its result is written to `gpu-<part>.json`
and the first 1,500 characters are printed. An interrupted run keeps the results of completed parts.
If a part fails, its error is reported, the other parts still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, paired, seconds_of
from compiled import Program, Steps, attempt, busy, compile_all
from decoding import NOTHING, Decoding
from jaxpersona.kernels.attention import Asked
from matmuls import products

import jaxpersona as jp
from jaxpersona.captures.capture import Capture
from jaxpersona.models import prepared
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.planning import chips


class Bench:
    """The loaded model and one method per benchmark part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        begun = time.perf_counter()
        self.model = jp.load(args.model, dtype=args.dtype)
        jax.block_until_ready(self.model.params)
        self.load_s = time.perf_counter() - begun
        self.config = self.model.config
        self.layers = self.config.n_layers
        middle = 2 * self.layers // 3
        self.eight = range(middle, min(middle + 8, self.layers))
        self.direction = np.random.default_rng(0).normal(size=self.config.d_model)
        kind = jax.devices()[0].device_kind.lower()
        self.chip = next((c for name, c in chips.CHIPS.items() if name in kind), None)
        self.small = args.small

    def cap(self, layers: range, floor: float = 1e3) -> jp.Interventions:
        """Return a cap; the default floor is so high that the cap edits every token."""
        return jp.cap(self.direction, layers=layers, floor=floor)

    def many(self, rows: int) -> jp.Interventions:
        """Return a distinct cap for each row, with its own floor and random direction."""
        bank = np.random.default_rng(1).normal(size=(rows, self.config.d_model))
        return jp.cap(bank, layers=self.eight, floor=np.linspace(1e3, 2e3, rows),
                      rows=np.arange(rows))

    # ---- parts ---------------------------------------------------------------------------------

    def limits(self) -> dict[str, Any]:
        """Measure the memory bandwidth and the peak matmul FLOP/s."""
        x = jnp.ones(((1 << 24) if self.small else (1 << 30),), jnp.float32)
        copy = jax.jit(lambda x: x + 1)
        read = jax.jit(jnp.sum)
        size = 1024 if self.small else 8192
        key = jax.random.key(0)
        a, b = (jax.random.normal(k, (size, size), self.args.dtype) for k in jax.random.split(key))
        multiply = jax.jit(lambda a, b: jnp.matmul(a, b))
        return {"copy_bytes_per_s": 2 * x.nbytes / seconds_of(lambda: copy(x), 10),
                "read_bytes_per_s": x.nbytes / seconds_of(lambda: read(x), 10),
                "matmul_flops_per_s": 2 * size**3 / seconds_of(lambda: multiply(a, b), 10),
                "memory_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
                "load_s": self.load_s}

    def decode1(self) -> dict[str, Any]:
        """Measure the overhead of caps when decoding 1 row."""
        return self._decoding(1)

    def decode32(self) -> dict[str, Any]:
        """Measure the overhead of caps when decoding 32 rows."""
        return self._decoding(32)

    def decode256(self) -> dict[str, Any]:
        """Measure the overhead of a shared cap and of per-row caps when decoding 256 rows."""
        return self._decoding(256)

    def sampled32(self) -> dict[str, Any]:
        """Time decoding of 32 rows at temperature 0.7 and top-p 0.9."""
        return self._sampled(32)

    def sampled256(self) -> dict[str, Any]:
        """Time decoding of 256 rows at temperature 0.7 and top-p 0.9."""
        return self._sampled(256)

    def weights1(self) -> dict[str, Any]:
        """Time decoding of 1 row with separate and joined weights, unquantized and in int8."""
        return self._weights(1)

    def weights32(self) -> dict[str, Any]:
        """Time decoding of 32 rows with separate and joined weights, unquantized and in int8."""
        return self._weights(32)

    def options1(self) -> dict[str, Any]:
        """Time decoding of 1 row with joined weights, compiled with different XLA options."""
        return self._options(1)

    def options32(self) -> dict[str, Any]:
        """Time decoding of 32 rows with joined weights, compiled with different XLA options."""
        return self._options(32)

    def context1(self) -> dict[str, Any]:
        """Time uncapped decoding of 1 row after a long prompt."""
        return self._context(1)

    def context32(self) -> dict[str, Any]:
        """Time uncapped decoding of 32 rows after a long prompt."""
        return self._context(32)

    def products(self) -> dict[str, Any]:
        """Time a block's matmuls for 1 and 32 rows, in several weight layouts and dtypes."""
        return products(self.config, self.args.dtype, self.small)

    def prefill(self) -> dict[str, Any]:
        """Time prefills that capture every layer's mean, with XLA attention and cuDNN attention.

        Some prefills are also timed with the cheapest capture (`plain`). Without a GPU, only XLA
        attention is timed; with one, the result also contains the differences between the means of
        the two implementations, relative to those of XLA attention.
        """
        widths = (96, 64) if self.small else (2048, 512, 256, 128)
        tokens = 768 if self.small else 16384
        means = jp.capture.mean(jp.everywhere)
        least = jp.capture.last(layers=[self.layers - 1])
        gpu = jax.devices()[0].platform == "gpu"
        flashes: tuple[Asked, ...] = ("xla", "cudnn") if gpu else ("xla",)
        arms: list[tuple[int, Asked, str]] = [
            (width, attention, name) for width in widths for attention in flashes
            for name in ("means", "plain")
            if name == "means" or (attention == flashes[-1] and width >= widths[1])]

        def build(arm: tuple[int, Asked, str]) -> tuple[Program, Any]:
            width, attention, name = arm
            rows = max(1, tokens // width)
            # the seed is the prompt length, so all arms with this length get the same tokens
            drawn = np.random.default_rng(width).integers(
                4, self.config.vocab_size, (rows, width))
            text = jax.tree.map(jnp.asarray, make_batch(drawn))
            read = means if name == "means" else least

            def work(params: Any, text: Any, read: Any) -> Any:
                return jp.forward(params, self.config, text, capture=read, logits=None,
                                  attention=attention).captured

            built = jax.jit(work).lower(self.model.params, text, read).compile()
            return built, (self.model.params, text, read)

        built, compile_s = compile_all({str(arm): (lambda arm=arm: build(arm)) for arm in arms})
        values: dict[str, Any] = {}
        out: dict[str, Any] = {"tokens": tokens, "compile_s": compile_s}
        for width, attention, name in arms:
            program, given = built[str((width, attention, name))]
            spent = seconds_of(lambda program=program, given=given: program(*given), 5)
            rows = max(1, tokens // width)
            flops = rows * self.config.prefill_flops(width)
            key = f"{width} {attention} {name}"
            out[key] = {"ms": round(1e3 * spent, 3), "tokens_per_s": round(rows * width / spent),
                        "flops_per_s": flops / spent,
                        "mfu": round(flops / spent / self.chip.peak, 4) if self.chip else None}
            if name == "means":
                state = program(*given)["mean"]
                values[key] = np.asarray(state.value, np.float32)
        for width in widths:
            a, b = (values.get(f"{width} {attention} means") for attention in ("xla", "cudnn"))
            if a is not None and b is not None:
                apart = np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)
                out[f"{width} cudnn against xla"] = {
                    "worst_relative": float(apart.max()), "median_relative":
                    float(np.median(apart))}
        return out

    def start(self) -> dict[str, Any]:
        """Time the first token after a 32-token prompt, with and without compilation."""
        setting = Decoding(self.model, 1, 16)
        begun = time.perf_counter()
        jax.block_until_ready(setting.start(NOTHING, Capture()).token)
        first = time.perf_counter() - begun
        warm = seconds_of(lambda: setting.start(NOTHING, Capture()).token, 10)
        return {"load_s": round(self.load_s, 3), "first_call_s": round(first, 3),
                "warm_first_token_ms": round(1e3 * warm, 3)}

    # ---- helpers --------------------------------------------------------------------------------

    def _decoding(self, rows: int) -> dict[str, Any]:
        steps = 8 if self.small else 64
        edits = {"uncapped": NOTHING, "idle8": self.cap(self.eight, -1e9),
                 "capped8": self.cap(self.eight), "all": self.cap(range(self.layers))}
        if rows > 32:
            edits["distinct8"] = self.many(rows)
            del edits["idle8"]
        made = Steps(self.model, rows, steps, edits)
        found = paired({name: made.timer(name) for name in edits}, "uncapped",
                       budget=self.args.budget)
        step = found["uncapped"]["seconds"] / steps
        out = {"rows": rows, "steps": steps, "prompt": made.setting.prompt,
               "capped_layers": f"{self.eight.start}:{self.eight.stop}",
               "compile_s": made.compile_s, "arms": found, "kernels": made.kernels}
        if "distinct8" in edits:
            out["distinct_over_shared"] = round(
                found["distinct8"]["ratio"] / found["capped8"]["ratio"], 4)
        out |= self._bound(made.setting, step)
        if rows <= 32:
            out["profile"] = {name: attempt(self._profile, made, name)
                              for name in ("uncapped", "all")}
        return out

    def _weights(self, rows: int) -> dict[str, Any]:
        steps = 8 if self.small else 64
        params = self.model.params
        forms = {"dense": params, "joined": prepared.with_joined(params),
                 "int8": prepared.in_int8(params), "int8 joined":
                 prepared.in_int8(params, join=True)}
        made = Steps(self.model, rows, steps, dict.fromkeys(forms, NOTHING), params=forms)
        found = paired({name: made.timer(name) for name in forms}, "dense",
                       budget=self.args.budget)
        step = found["dense"]["seconds"] / steps
        out = {"rows": rows, "steps": steps, "prompt": made.setting.prompt,
               "compile_s": made.compile_s, "arms": found, "kernels": made.kernels}
        for name in forms:
            arm = found[name]["seconds"] / steps
            found[name]["ms_per_step"] = round(1e3 * arm, 4)
        joined = self._bound(made.setting, found["joined"]["seconds"] / steps)
        out |= self._bound(made.setting, step) | {"joined_mbu": joined.get("mbu")}
        out["profile"] = {name: attempt(self._profile, made, name)
                          for name in ("joined", "int8 joined")}
        return out

    def _options(self, rows: int) -> dict[str, Any]:
        steps = 8 if self.small else 64
        names = ["default", *OPTIONS]
        joined = prepared.with_joined(self.model.params)
        made = Steps(self.model, rows, steps, dict.fromkeys(names, NOTHING),
                     params=dict.fromkeys(names, joined), options=OPTIONS)
        tokens = {name: np.asarray(made.run(name).tokens) for name in made.programs}
        found = paired({name: made.timer(name) for name in made.programs}, "default",
                       budget=self.args.budget)
        for name, arm in found.items():
            arm |= {"ms_per_step": round(1e3 * arm["seconds"] / steps, 4),
                    "same_tokens": round(float((tokens[name] == tokens["default"]).mean()), 4)}
        best = min(found, key=lambda name: found[name]["seconds"])
        out = {"rows": rows, "steps": steps, "prompt": made.setting.prompt,
               "compile_s": made.compile_s, "options": OPTIONS, "arms": found,
               "failed": made.failed, "kernels": made.kernels, "best": best}
        out |= self._bound(made.setting, found["default"]["seconds"] / steps)
        fastest = self._bound(made.setting, found[best]["seconds"] / steps)
        out["best_mbu"] = fastest.get("mbu")
        out["profile"] = {best: attempt(self._profile, made, best)}
        return out

    def _context(self, rows: int) -> dict[str, Any]:
        steps, prompt = (8, 64) if self.small else (64, 1856)
        made = Steps(self.model, rows, steps, {"uncapped": NOTHING}, prompt=prompt)
        step = made.fastest("uncapped") / steps
        return {"rows": rows, "prompt": prompt, "steps": steps, "compile_s": made.compile_s,
                "kernels": made.kernels} | self._bound(made.setting, step)

    def _sampled(self, rows: int) -> dict[str, Any]:
        steps = 8 if self.small else 64
        found: dict[str, Any] = {"rows": rows, "steps": steps}
        ways: dict[str, dict[str, Any]] = {
            "greedy": {}, "sampled": {"temperature": 0.7, "top_p": 0.9}}
        for name, how in ways.items():
            made = Steps(self.model, rows, steps, {name: NOTHING}, **how)
            step = made.fastest(name) / steps
            found[name] = {"compile_s": made.compile_s, "kernels": made.kernels[name],
                           **self._bound(made.setting, step),
                           "profile": attempt(self._profile, made, name)}
        return found

    def _bound(self, setting: Decoding, step: float) -> dict[str, Any]:
        moved = setting.bytes
        out = {"ms_per_step": round(1e3 * step, 4), "bytes_per_step": moved,
               "tokens_per_s": round(setting.rows / step, 1),
               "gb_per_s": round(moved / step / 1e9, 1)}
        if self.chip:
            out |= {"ideal_ms": round(1e3 * moved / self.chip.bandwidth, 4),
                    "mbu": round(moved / step / self.chip.bandwidth, 4)}
        return out

    def _profile(self, made: Steps, name: str) -> dict[str, Any]:
        """Profile one arm and return the times of its kernels; with --hlo, also write its HLO."""
        if self.args.hlo is not None:
            text = made.programs[name].as_text()
            kept = self.args.hlo / f"gpu-decode{made.setting.rows}-{name}{self.args.tag}.hlo.txt"
            kept.write_text(text[:6_000_000])
        once = made.timer(name)
        once()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                spent = once()
            file = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))[-1]
            steps = made.setting.steps
            return {"ms_per_step": round(1e3 * spent / steps, 4)} | busy(file, steps)


# XLA compiler options by the name of their arm; options that this XLA does not know are left out
OPTIONS: dict[str, dict[str, Any]] = {
    "dependent launch": {"xla_gpu_enable_pdl": True, "xla_gpu_enable_pdl_launch": True},
    "dependent launch only": {"xla_gpu_enable_pdl_launch": True},
    "block fusions": {"xla_gpu_experimental_enable_fusion_block_level_rewriter": True},
    "gemm fusion 2": {"xla_gpu_experimental_gemm_fusion_v2": True},
    "fusion autotuner": {"xla_gpu_experimental_enable_fusion_autotuner": True},
    "multi-output": {"xla_gpu_experimental_enable_same_shape_multi_output_fusion": True,
                     "xla_gpu_unsupported_enable_triton_multi_output_fusion": True},
    "unrolled graph": {"xla_gpu_enable_command_buffer": "+WHILE",
                       "xla_gpu_command_buffer_unroll_loops": True},
}
PARTS = ("limits", "decode32", "decode1", "context32", "context1", "prefill", "decode256",
         "products", "weights1", "weights32", "options1", "options32", "sampled32",
         "sampled256", "start")


def main() -> None:
    """Run the selected parts in the given order and write their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:qwen3-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=pathlib.Path,
                        help="folder for the results; default: bench/results, or, with "
                             "--small, a temporary folder")
    parser.add_argument("--hlo", type=pathlib.Path,
                        help="folder for the compiled HLO text of the profiled programs")
    parser.add_argument("--tag", default="", help="suffix for the names of the output files")
    parser.add_argument("--budget", type=float, default=20.0,
                        help="time limit per comparison in seconds")
    parser.add_argument("--seconds", type=float, default=330.0,
                        help="start no further part after this many seconds")
    parser.add_argument("--small", action="store_true", help="small shapes, for a smoke test")
    args = parser.parse_args()
    if args.out is None:  # a smoke test must not overwrite GPU results
        args.out = pathlib.Path(tempfile.mkdtemp() if args.small else "bench/results")
    for folder in (args.out, args.hlo):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    bench = Bench(args)
    failed = False
    about = {"model": args.model, "dtype": args.dtype, **machine(),
             "date": time.strftime("%Y-%m-%d")}
    for part in args.parts:
        if time.perf_counter() - begun > args.seconds:
            print(f"{part}: skipped, because the time limit --seconds was exceeded after "
                  f"{time.perf_counter() - begun:.0f} s", flush=True)
            continue
        at = time.perf_counter()
        try:
            found = getattr(bench, part)()
        except Exception as error:  # continue with the other parts
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            failed = True
        found = {"bench": f"gpu {part}", **about, "seconds": round(time.perf_counter() - at, 1),
                 **found}
        text = json.dumps(found)
        (args.out / f"gpu-{part}{args.tag}.json").write_text(text + "\n")
        print(text[:1500], flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
