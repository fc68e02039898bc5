"""Compare the peak device memory of capped generation with the estimate from `plan`.

    python bench/fit.py --model random:qwen3-32b --dtype bfloat16 --batch 32 --context 2048

The measured peak includes weights, cache and temporaries. It comes from the device's memory
statistics or, if there are none, from the resident memory of the process. The memory bandwidth
utilization (MBU) is relative to the chip's published bandwidth.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import Peak, report
from decoding import Decoding

import jaxpersona as jp
from jaxpersona.interventions import resolve_layers
from jaxpersona.planning import chips
from jaxpersona.planning.plan import plan


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new", type=int, default=512, help="cache slots for the reply")
    parser.add_argument("--layers", default=None,
                        help="layers to cap, a half-open range; default: the upper half")
    parser.add_argument("--chip", default="h200:1", help="chips for the estimate, such as h200:1")
    args = parser.parse_args()
    with Peak() as peak:
        model = jp.load(args.model, dtype=args.dtype)
        total = model.config.n_layers
        layers = args.layers or f"{total // 2}:{total}"
        direction = np.random.default_rng(0).normal(size=model.config.d_model)
        # `Decoding` allocates 16 slots more than it needs
        setting = Decoding(model, args.batch, args.new - 16, prompt=args.context - args.new)
        edits = jp.cap(direction, layers=resolve_layers(layers, total), floor=1e3)
        setting.timer(edits, prompts=True)()
    once = setting.timer(edits)  # outside `Peak`, because the timer copies the cache
    once()
    step = once() / setting.steps
    estimate = plan(model.config, args.chip, batch=args.batch, context=args.context)
    planned = estimate["bytes_per_chip"]["total"]
    chip, _ = chips.parse(args.chip)
    report(
        "fit", model, args, capped_layers=layers, prompt_tokens=setting.prompt,
        dtype=str(model.params.like.dtype), bytes=peak.above, planned_bytes=planned,
        planned=estimate["bytes_per_chip"], planned_over_measured=round(planned / peak.above, 4),
        ms_per_step=round(1000 * step, 3),
        tokens_per_second=round(args.batch / step, 1),
        mbu=round(setting.bytes / step / chip.bandwidth, 4),
    )


if __name__ == "__main__":
    main()
