"""Measure decoding and extraction on this device for a roofline plot.

    python bench/roofline.py --model mini --batch 1 8 32 128

Each point shows FLOP/s against the arithmetic intensity in FLOP/byte. The roof is min(peak,
intensity · bandwidth), with measured peak FLOP/s and bandwidth. The bytes are the minimum that must
be read: the weights once per forward pass and, when decoding, the keys and values. Models that fit
in the CPU cache, such as `mini`, can exceed the roof.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from common import bandwidth, peak_flops, report, seconds_of
from decoding import PROMPT, Decoding

import jaxpersona as jp
from jaxpersona.models.batch import batch


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="prompt length in tokens")
    parser.add_argument("--width", type=int, default=256, help="tokens per extracted row")
    parser.add_argument("--rows", type=int, default=4, help="number of extracted rows")
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    config, dtype = model.config, model.params.like.dtype
    roof = {"bytes_per_second": bandwidth(), "flops_per_second": peak_flops(dtype)}
    points = []

    def point(name: str, flops: float, moved: float, seconds: float) -> None:
        limit = max(flops / roof["flops_per_second"], moved / roof["bytes_per_second"])
        points.append({"name": name, "intensity": round(flops / moved, 3),
                       "flops_per_second": round(flops / seconds), "of_roof":
                       round(limit / seconds, 4)})

    heads = 1 if config.tied_embeddings else 2
    weights = config.parameters - (heads - 1) * config.vocab_size * config.d_model
    for rows in args.batch:
        setting = Decoding(model, rows, args.steps, prompt=args.prompt)
        once = setting.timer()
        once()
        seen = args.prompt + args.steps // 2
        attention = 4 * config.n_layers * config.n_heads * config.head_dim * seen
        point(f"decode, {rows} rows", rows * (2 * weights + attention), setting.bytes,
              min(once() for _ in range(5)) / args.steps)
    tokens = np.random.default_rng(0).integers(4, config.vocab_size, (args.rows, args.width))
    text = jax.tree.map(jnp.asarray, batch(tokens))
    read = jp.capture.mean(jp.everywhere)
    forward = jax.jit(lambda params, text: jp.forward(
        params, config, text, capture=read, logits=None).captured)
    flops = args.rows * config.prefill_flops(args.width)
    moved = (config.parameters - heads * config.vocab_size * config.d_model) * dtype.itemsize
    point(f"extraction, {args.rows} × {args.width} tokens", flops, moved,
          seconds_of(lambda: forward(model.params, text)))
    report("roofline", model, args, dtype=str(dtype),
           roof={name: round(value) for name, value in roof.items()}, points=points)


if __name__ == "__main__":
    main()
