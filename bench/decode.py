"""Measure decode speed, memory bandwidth utilization (MBU) and the cost of capturing means.

    python bench/decode.py --model mini --batch 1 8 32

MBU = bytes of weights, keys and values read per step ÷ (seconds per step · measured bandwidth).
"""

from __future__ import annotations

import argparse

from common import bandwidth, paired, report
from decoding import Decoding

import jaxpersona as jp


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=40.0, 
                        help="time limit per batch size in seconds")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    speed = bandwidth()
    by_batch = {}
    for rows in args.batch:
        setting = Decoding(model, rows, args.steps, temperature=args.temperature,
                           top_p=args.top_p)
        found = paired({"plain": setting.timer(),
                        "captured": setting.timer(read=jp.capture.mean(jp.response))},
                       "plain", pairs=args.pairs, budget=args.budget)
        step = found["plain"]["seconds"] / args.steps
        by_batch[str(rows)] = {
            "tokens_per_second": round(rows / step, 1), "ms_per_step": round(1000 * step, 4),
            "mbu": round(setting.bytes / step / speed, 4),
            "ideal_ms": round(1000 * setting.bytes / speed, 4),
            "captured_over_plain": found["captured"]["ratio"],
            "captured_interval": found["captured"]["interval"],
            "captured_unresolved": found["captured"]["unresolved"],
        }
    report("decode", model, args, dtype=str(model.params.like.dtype),
           gigabytes_per_second=round(speed / 1e9, 2), **by_batch[str(args.batch[-1])],
           by_batch=by_batch)


if __name__ == "__main__":
    main()
