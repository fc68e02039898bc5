"""Measure the overhead of per-row interventions: several distinct caps against one shared cap.

    python bench/rows.py --model mini --batch 256
"""

from __future__ import annotations

import argparse

import numpy as np
from common import paired, report
from decoding import Decoding

import jaxpersona as jp


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=120.0, help="time limit in seconds")
    parser.add_argument("--distinct", type=int, nargs="+", default=None,
                        help="numbers of distinct caps to measure, besides one per row; "
                             "default: 4, 16, 64, …")
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    asked = [4**i for i in range(1, 8) if 4**i < args.batch]
    if args.distinct is not None:
        asked = args.distinct
    if not all(0 < n <= args.batch for n in asked):
        parser.error(f"--distinct is {asked}; each number must be from 1 to {args.batch} (--batch)")
    model = jp.load(args.model, dtype=args.dtype)
    total = model.config.n_layers
    layers = range(total // 2, total)
    bank = np.random.default_rng(0).normal(size=(args.batch, model.config.d_model))
    floors = np.linspace(1e3, 2e3, args.batch)
    arms = {"shared": jp.cap(bank[0], layers=layers, floor=1e3)}
    some = sorted({*asked, args.batch})
    for n in some:
        arms[str(n)] = jp.cap(bank[:n], layers=layers, floor=floors[:n],
                              rows=np.arange(args.batch) % n)
    setting = Decoding(model, args.batch, args.steps)
    found = paired({name: setting.timer(edits) for name, edits in arms.items()}, "shared",
                   pairs=args.pairs, budget=args.budget)
    most = found[str(args.batch)]
    report(
        "rows", model, args, dtype=str(model.params.like.dtype),
        capped_layers=f"{layers.start}:{layers.stop}", distinct_over_shared=most["ratio"],
        interval=most["interval"], unresolved=most["unresolved"], pairs=most["pairs"],
        tokens_per_second=round(args.batch * args.steps / found["shared"]["seconds"], 1),
        by_distinct={str(n): {k: found[str(n)][k] for k in ("ratio", "interval", "unresolved")}
                     for n in some},
    )


if __name__ == "__main__":
    main()
