"""Compare decoding without a cap, with a cap that never binds (idle) and with a cap that binds.

    python bench/cap_overhead.py --model mini --batch 32 --layers 4:8 --sweep

The arms (timed calls) run in alternating pairs. A cap adds a few fusions to each capped layer and a
few to the step as a whole. The fusions are counted in the compiled programs, so their counts have
no timing noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from common import paired, report
from decoding import NOTHING, Decoding

import jaxpersona as jp
from jaxpersona.interventions import resolve_layers


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", default=None,
                        help="layers to cap, a half-open range; default: the upper half")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=120.0, help="time limit in seconds")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--sweep", action="store_true",
                        help="also measure caps on ¼ of the layers and on all layers")
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    total = model.config.n_layers
    named = args.layers or f"{total // 2}:{total}"
    chosen = resolve_layers(named, total)
    direction = np.random.default_rng(0).normal(size=model.config.d_model)

    def capped(layers: Sequence[int], floor: float = 1e3) -> jp.Interventions:
        return jp.cap(direction, layers=layers, floor=floor)

    edits = {"uncapped": NOTHING, "idle": capped(chosen, -1e9), "capped": capped(chosen)}
    counts = {}
    if args.sweep:
        counts = {n: f"capped{n}" for n in sorted({total // 4, total})}
        edits |= {name: capped(range(total - n, total)) for n, name in counts.items()}
    setting = Decoding(model, args.batch, args.steps, temperature=args.temperature,
                       top_p=args.top_p)
    found = paired({name: setting.timer(value) for name, value in edits.items()}, "uncapped",
                   pairs=args.pairs, budget=args.budget)
    plain = found["uncapped"]["seconds"]
    bare, half, every = (setting.fusions(e) for e in (
        NOTHING, capped(range(total - total // 2, total)), capped(range(total))))
    slope = (every - half) / (total - total // 2)
    report(
        "cap_overhead", model, args, capped_layers=named,
        dtype=str(model.params.like.dtype),
        capped_over_uncapped=found["capped"]["ratio"], interval=found["capped"]["interval"],
        unresolved=found["capped"]["unresolved"], idle_over_uncapped=found["idle"]["ratio"],
        idle_interval=found["idle"]["interval"], idle_unresolved=found["idle"]["unresolved"],
        pairs=found["capped"]["pairs"],
        ms_per_step=round(1000 * plain / args.steps, 4),
        tokens_per_second=round(args.batch * args.steps / plain, 1),
        fusions_uncapped=bare, added_fusions_per_layer=round(slope, 2),
        added_fusions_once=round(every - bare - slope * total, 2),
        by_layers={str(n): {k: found[name][k] for k in ("ratio", "interval", "unresolved")}
                   for n, name in {**counts, len(chosen): "capped"}.items()},
    )


if __name__ == "__main__":
    main()
