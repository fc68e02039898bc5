"""What a cap costs: decode steps a second, uncapped, with a cap that never binds, and with one that
binds.

    python bench/cap_overhead.py --model mini --batch 32 --layers 4:8 --steps 192

The three arms run in alternating pairs; fusions are counted in the compiled program, which noise
does not touch.
"""

from __future__ import annotations

import argparse
import datetime
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, paired, report

import jaxpersona as jp
from jaxpersona.batch import batch
from jaxpersona.capture import Capture
from jaxpersona.decode import Stops, decode, prefill
from jaxpersona.interventions import Interventions
from jaxpersona.sampling import sampling

PROMPT = 32


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", default=None, help="half-open, as 4:8; default: the upper half")
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    total = model.config.n_layers
    start, stop = (int(x) for x in (args.layers or f"{total // 2}:{total}").split(":"))
    direction = np.random.default_rng(0).normal(size=model.config.d_model)
    layers = range(start, stop)
    arms = {
        "uncapped": Interventions(),
        "idle": jp.cap(direction, layers=layers, floor=-1e9),
        "capped": jp.cap(direction, layers=layers, floor=1e3),
    }
    setting = _Setting(model, args)
    found = paired({name: setting.timer(edits) for name, edits in arms.items()}, "uncapped",
                   pairs=args.pairs)
    fusions = {name: setting.fusions(edits) for name, edits in arms.items()}
    plain = found["uncapped"]["seconds"]
    report({
        "bench": "cap_overhead", "model": model.name, **machine(),
        "date": datetime.date.today().isoformat(), "arguments": vars(args),
        "capped_layers": f"{start}:{stop}", "dtype": str(model.params.embed_vd.dtype),
        "capped_over_uncapped": found["capped"]["ratio"],
        "interval": found["capped"]["interval"], "unresolved": found["capped"]["unresolved"],
        "idle_over_uncapped": found["idle"]["ratio"], "idle_interval": found["idle"]["interval"],
        "pairs": found["capped"]["pairs"],
        "ms_per_step": round(1000 * plain / args.steps, 4),
        "tokens_per_second": round(args.batch * args.steps / plain, 1),
        "added_fusions_per_layer": (fusions["capped"] - fusions["uncapped"]) / len(layers),
    })


class _Setting:
    """One batch of random prompts, decoded for a fixed number of steps."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self.model, self.steps = model, args.steps
        rng = np.random.default_rng(1)
        prompts = rng.integers(0, model.config.vocab_size, (args.batch, PROMPT))
        self.batch = jax.tree.map(jnp.asarray, batch(prompts))
        self.how = sampling(args.batch, temperature=args.temperature, top_p=args.top_p)
        self.greedy = args.temperature == 0
        self.stops = Stops(jnp.full((4,), -1, jnp.int32), jnp.full((2,), -1, jnp.int32))
        self.limit = jnp.full((args.batch,), args.steps + 1, jnp.int32)
        self.until = jnp.asarray(args.steps, jnp.int32)

    def start(self, edits: Interventions) -> Any:
        """Run the prompts."""
        return prefill(self.model.params, self.model.config, self.batch, edits, Capture(), self.how,
                       self.stops, self.limit, slots=PROMPT + self.steps + 16,
                       max_new=self.steps + 1, greedy=self.greedy)

    def arguments(self, edits: Interventions) -> tuple:
        """What the decode program takes."""
        return (self.model.params, self.model.config, self.start(edits), edits, Capture(), self.how,
                self.stops, self.until)

    def timer(self, edits: Interventions) -> Any:
        """Return a call that times one decode, its prefill left out."""

        def once() -> float:
            arguments = jax.block_until_ready(self.arguments(edits))
            begun = time.perf_counter()
            state = jax.block_until_ready(decode(*arguments, greedy=self.greedy))
            spent = time.perf_counter() - begun
            if int(state.step) != self.steps:
                raise RuntimeError(f"{int(state.step)} steps ran, not {self.steps}")
            return spent

        return once

    def fusions(self, edits: Interventions) -> int:
        """Count the fusions of the compiled decode program."""
        text = decode.lower(*self.arguments(edits), greedy=self.greedy).compile().as_text()
        return len(re.findall(r"= \S+ fusion\(|\) fusion\(", text))


if __name__ == "__main__":
    main()
