"""Benchmark activation extraction from conversations against forward hooks in transformers.

    python bench/extract.py --model mini --conversations 256

Both sides compute every layer's mean activation over response tokens. In transformers, the variant
"hooks" runs the full model on batches in the given order and keeps every layer's output until the
batch is averaged, as in the code of Lu et al. 2026. The variant "sorted" also sorts the
conversations by length, and the variant "headless" also skips the output head. Each side runs in
its own process and is timed after a warm-up run. The reported memory is the peak during a run minus
the memory before it, which includes the weights. Model FLOP utilization (MFU) is relative to the
device's measured peak matmul FLOP/s and does not count padding.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from common import Peak, peak_flops, report
from conversations import conversations

KINDS = {"hooks": (False, True), "sorted": (True, True), "headless": (True, False)}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--mean", type=int, default=150, help="mean length in tokens")
    parser.add_argument("--most", type=int, default=512, help="maximum length in tokens")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--peers", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--without-plain", action="store_true",
                        help="do not measure the cost of the capture")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: run(side, folder) for side in ["ours", *args.peers]}
        vectors = {side: np.load(f"{folder}/{side}.npy") for side in sides}
    ours = sides.pop("ours")
    norm = np.linalg.norm(vectors["ours"], axis=-1)
    apart = {side: float((np.linalg.norm(vectors[side] - vectors["ours"], axis=-1) / norm).max())
             for side in sides}
    ratios = {side: round(found["seconds"] / ours["seconds"], 3) for side, found in sides.items()}
    report(
        "extract", args.model, args, tokens=ours["tokens"], seconds=ours["seconds"],
        padding_efficiency=round(ours["tokens"] / ours["padded"], 3),
        tokens_per_second=round(ours["tokens"] / ours["seconds"], 1), mfu=ours["mfu"],
        capture_over_plain=ours["capture_over_plain"], programs=ours["programs"],
        ratio_to_hooks=ratios.get("hooks"), ratio_to_sorted_hooks=ratios.get("sorted"),
        ratio_to_sorted_hooks_without_head=ratios.get("headless"),
        worst_distance={side: round(value, 8) for side, value in apart.items()},
        peak_bytes=ours["peak_bytes"],
        peer_peak_bytes={side: found["peak_bytes"] for side, found in sides.items()},
        peak_memory_ratio_to_hooks=round(ours["peak_bytes"] / sides["hooks"]["peak_bytes"], 4)
        if "hooks" in sides else None,
    )


def run(side: str, folder: str) -> dict[str, Any]:
    """Measure one side in a subprocess and return its results."""
    out = pathlib.Path(folder) / f"{side}.npy"
    done = subprocess.run([sys.executable, *sys.argv, "--side", side, "--out", str(out)],
                          check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {found['seconds']} s, {found['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return found


def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side, save its vectors to `args.out` and return the results."""
    import jax

    import jaxpersona as jp
    from jaxpersona.engine.batches import width_of
    from jaxpersona.engine.compiled import KEPT

    model = jp.load(args.model, dtype=args.dtype if args.side == "ours" else "float32")
    rows = conversations(args.conversations, model.config.vocab_size, args.mean,
                         min(args.most, model.config.max_context))
    if args.side != "ours":
        from peers import Hooked

        peer = Hooked(model, args.peer_dtype)
        del model
        sort, head = KINDS[args.side]

        def work() -> np.ndarray:
            return peer.means(rows, args.peer_batch, sort=sort, head=head)

        return timed(work, args, {})

    def work() -> np.ndarray:
        found = jp.extract(model, rows, batch_tokens=args.batch_tokens)
        return found.captured["mean"]

    plain = jp.capture.last(layers=[model.config.n_layers - 1])  # the cheapest capture
    groups: dict[int, list[Any]] = {}
    for row in rows:
        groups.setdefault(width_of(row.tokens.size), []).append(row)
    KEPT.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # compile the programs in parallel
        list(pool.map(lambda group: jp.extract(model, group, batch_tokens=args.batch_tokens),
                      groups.values()))
    out = jp.extract(model, rows, batch_tokens=args.batch_tokens)
    flops = sum(model.config.prefill_flops(row.tokens.size) for row in rows)
    found = timed(work, args, {"tokens": out.tokens, "padded": out.padded,
                               "programs": len(KEPT)})
    bare = None if args.without_plain else least(
        lambda: jp.extract(model, rows, capture=plain, batch_tokens=args.batch_tokens),
        args.repeats)
    peak = peak_flops(model.params.like.dtype)
    jax.block_until_ready(model.params.embed_vd)
    return found | {"capture_over_plain": bare and round(bare / found["seconds"], 4),
                    "mfu": round(flops / found["seconds"] / peak, 4)}


def timed(work: Any, args: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    """Run once to record the peak memory and save the vectors, then time `args.repeats` runs.

    If `args.repeats` is 0, the seconds are those of the first run.
    """
    with Peak() as peak:
        np.save(args.out, work())
    seconds = least(work, args.repeats) if args.repeats else peak.seconds
    return {"seconds": round(seconds, 4), "peak_bytes": peak.above, **more}


def least(work: Any, repeats: int) -> float:
    """Return the seconds of the fastest of `repeats` runs, after a warm-up run."""
    work()
    times = []
    for _ in range(max(repeats, 1)):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


if __name__ == "__main__":
    main()
