"""Compare decoding with and without the check for non-finite logits.

    python bench/guard.py --model mini --batch 1 8 32

Both programs run in one process, in alternating pairs, without and with a cap on the upper half of
the layers. The program `unchecked` is traced with a check that always passes, so XLA removes all
operations that only the check needs. A ratio below 1 means that the check costs time. The counts of
fusions have no timing noise.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import paired, report
from decoding import NOTHING, Decoding

import jaxpersona as jp
from jaxpersona.engine import programs
from jaxpersona.engine.compiled import program

BAR = 0.99


def _always(logits: jax.Array, token: jax.Array | None = None) -> jax.Array:
    """Return an array [B] of True; this function replaces `sampling.finite`."""
    del token
    return jnp.ones(logits.shape[:1], bool)


@program(static=("config", "greedy"), donate=("state",))
@functools.wraps(programs.decode.__wrapped__)
def unchecked(*args: Any, **named: Any) -> programs.State:
    """Run `decode` without the check for non-finite logits."""
    with mock.patch.object(programs, "finite", _always):
        return programs.decode.__wrapped__(*args, **named)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=300.0,
                        help="time limit per comparison in seconds")
    args = parser.parse_args()
    model = jp.load(args.model)
    depth, width = model.config.n_layers, model.config.d_model
    direction = np.random.default_rng(0).normal(size=width)
    cap = jp.cap(direction, layers=slice(depth // 2, depth), floor=0.0)
    results = {}
    for rows in args.batch:
        sides = {"unchecked": Decoding(model, rows, args.steps, program=unchecked),
                 "checked": Decoding(model, rows, args.steps)}
        for name, edit in (("decode", NOTHING), ("capped", cap)):
            arms = {side: setting.timer(edit) for side, setting in sides.items()}
            found = paired(arms, "unchecked", pairs=args.pairs, budget=args.budget)["checked"]
            found |= {"holds": found["interval"][0] >= BAR - 0.01 and not found["unresolved"],
                      "fusions": {side: setting.fusions(edit) for side, setting in sides.items()}}
            results[f"{name} {rows}"] = found
            print(f"{name} {rows}: {found}", flush=True)
    report("guard", model, args, arms=results)


if __name__ == "__main__":
    main()
