"""Compile benchmark programs ahead of time in threads, time them and summarize their profiles."""

from __future__ import annotations

import concurrent.futures
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import seconds_of
from decoding import NOTHING, Decoding

from jaxpersona.captures.capture import Capture
from jaxpersona.engine.programs import decode
from jaxpersona.planning import hlo

Program = Callable[..., Any]


class Steps:
    """Decode programs for one batch size, one program per edit, compiled ahead of time.

    `edits` maps names to interventions. `params` maps some of these names to parameters that
    replace the parameters of the model, and `options` maps some of them to XLA compiler options.
    A program with options that does not compile is left out, and `failed` contains the reason.
    """

    def __init__(self, model: Any, rows: int, steps: int, edits: dict[str, Any], *,
                 prompt: int = 32, params: dict[str, Any] | None = None,
                 options: dict[str, dict[str, Any]] | None = None, temperature: float = 0.0,
                 top_p: float = 1.0) -> None:
        self.setting = Decoding(model, rows, steps, prompt=prompt, temperature=temperature,
                                top_p=top_p)
        self.edits, read = edits, Capture()
        base = jax.block_until_ready(self.setting.start(NOTHING, read))
        self.given = {}
        for name, edit in edits.items():
            shape = jax.eval_shape(lambda edit=edit: self.setting.start(edit, read))
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                                 (shape.carry.applied, shape.carry.gates))
            state = base.replace(
                carry=base.carry.replace(applied=empty[0], gates=empty[1]))
            own, *rest = self.setting.arguments(state, edit, read)
            self.given[name] = ((params or {}).get(name, own), *rest)

        def build(name: str) -> Any:
            own = (options or {}).get(name)
            lowered = decode.lower(*self.given[name], greedy=temperature == 0)
            return attempt(lowered.compile, own) if own else lowered.compile()

        built, self.compile_s = compile_all(
            {name: (lambda name=name: build(name)) for name in edits})
        self.failed = {name: made for name, made in built.items() if isinstance(made, dict)}
        self.programs = {name: made for name, made in built.items() if name not in self.failed}
        self.kernels = {name: attempt(count_kernels, program)
                        for name, program in self.programs.items()}

    def run(self, name: str) -> Any:
        """Run all steps of one program and return its final `State`."""
        return jax.block_until_ready(self._ready(name)())

    def timer(self, name: str) -> Callable[[], float]:
        """Return a function that runs all steps of one program and returns the seconds."""
        def once() -> float:
            call = self._ready(name)
            begun = time.perf_counter()
            out = jax.block_until_ready(call())
            spent = time.perf_counter() - begun
            if int(out.step) != self.setting.steps:
                raise RuntimeError(f"the decode loop ended after {int(out.step)} steps "
                                   f"instead of {self.setting.steps}")
            return spent

        return once

    def fastest(self, name: str) -> float:
        """Return the seconds of the fastest of five runs of a program, after a warm-up run."""
        once = self.timer(name)
        once()
        return min(once() for _ in range(5))

    def _ready(self, name: str) -> Callable[[], Any]:
        """Copy the state, which the program donates, and return a function that runs the steps."""
        # the configuration is a static argument, which a compiled program does not take
        params, _, state, *rest = self.given[name]
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        return lambda: self.programs[name](params, fresh, *rest)


def count_kernels(program: Any) -> int:
    """Count the fusions in one step of a compiled decode program."""
    return hlo.fusions(hlo.operations(program.as_text()))


def timed(run: Program, given: tuple[Any, ...], count: int, size: int) -> dict[str, float]:
    """Time a call that runs `count` matmuls, each of which reads `size` bytes of weights.

    Returns:
      The microseconds per matmul ("us") and the bandwidth ("gb_per_s").
    """
    spent = seconds_of(lambda: run(*given), 10) / count
    return {"us": round(1e6 * spent, 2), "gb_per_s": round(size / spent / 1e9, 1)}


def attempt(work: Callable[..., Any], *given: Any) -> Any:
    """Return `work(*given)`, or {"failed": reason} if it raises, so that other results are kept."""
    try:
        return work(*given)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def compile_all(builds: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], float]:
    """Run the first build alone, then the others in threads that reuse its autotuning results.

    Returns:
      The result of each build by name, and the total seconds.
    """
    begun = time.perf_counter()
    names = list(builds)
    out = {names[0]: builds[names[0]]()}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rest = {name: pool.submit(builds[name]) for name in names[1:]}
        out |= {name: future.result() for name, future in rest.items()}
    return out, round(time.perf_counter() - begun, 2)


def busy(path: pathlib.Path, steps: int, most: int = 30) -> dict[str, Any]:
    """Summarize the GPU kernels in a profile: microseconds and calls per decode step.

    Args:
      path: the profile, an .xplane.pb file.
      steps: the number of profiled decode steps.
      most: the maximum number of kernels to list, in descending order of their total time.
    """
    data = jax.profiler.ProfileData.from_file(str(path))
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    lines = set()
    for plane in data.planes:
        if "gpu" not in plane.name.lower() or "device" not in plane.name.lower():
            continue
        for line in plane.lines:
            if not line.name.lower().startswith("stream"):
                continue
            lines.add(line.name)
            for event in line.events:
                name = event.name.rstrip("0123456789").rstrip("_.")
                spent[name] += event.duration_ns / 1e3
                calls[name] += 1
    top = sorted(spent, key=lambda name: -spent[name])[:most]
    return {"kernel_us_per_step": round(sum(spent.values()) / steps, 1),
            "kernel_calls_per_step": round(sum(calls.values()) / steps, 1), "lines": sorted(lines),
            "top": {name: [round(spent[name] / steps, 2), round(calls[name] / steps, 2)]
                    for name in top}}
