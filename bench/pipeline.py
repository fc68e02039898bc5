"""Compare one-pass capture with two-pass capture, and refilled batches with static batches.

    python bench/pipeline.py --model mini --batch 32

One pass generates the replies and captures every layer's response mean at the same time. With two
passes, the replies are generated first, and `jaxpersona.extract` then runs the complete
conversations. The ratio is the seconds of two passes divided by those of one pass. Its predicted
value is 1 + t_forward / t_generate, where t_generate and t_forward are the seconds of the first and
the second pass. For `one_pass_over_two_engines`, transformers with hooks runs the second pass, with
conversations sorted by length and without the output head. Refilled and static batches have the
same number of rows, and their reply lengths are geometrically distributed, with a mean of a third
of the maximum before they are clipped to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
from common import paired, report
from conversations import conversations

import jaxpersona as jp
from jaxpersona.captures.capture import Capture
from jaxpersona.engine.generate import queue
from jaxpersona.engine.programs import Stops
from jaxpersona.engine.sampling import sampling
from jaxpersona.interventions import Interventions
from jaxpersona.models.batch import ASSISTANT
from jaxpersona.text.chat import Row


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=60.0,
                        help="time limit per comparison in seconds")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--without-peer", action="store_true")
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    rows = conversations(args.prompts, model.config.vocab_size, args.prompt_tokens,
                         2 * args.prompt_tokens)
    run = Run(model, rows, args)
    mean = jp.capture.mean(jp.response)
    finished = [appended(row, tokens) for row, tokens in zip(rows, run.generate(), strict=True)]
    times: dict[str, list[float]] = {"generate": [], "forward": []}

    def two() -> float:
        for name, work in (("generate", run.generate), ("forward", lambda: jp.extract(
                model, finished))):
            times[name].append(clocked(work))
        return times["generate"][-1] + times["forward"][-1]

    found = paired({"two": two, "one": lambda: clocked(lambda: run.generate(mean))}, "two",
                   pairs=args.pairs, budget=args.budget)
    generate, forward = (statistics.median(times[name][1:]) for name in ("generate", "forward"))
    engines = None
    if not args.without_peer:
        from peers import Hooked

        peer = Hooked(model, args.peer_dtype)
        second = min(clocked(lambda: peer.means(finished, args.peer_batch, sort=True, head=False))
                     for _ in range(2))
        engines = round((generate + second) / found["one"]["seconds"], 4)
    refill = paired({"static": lambda: clocked(lambda: run.geometric(False)),
                     "refill": lambda: clocked(lambda: run.geometric(True))}, "static",
                    pairs=args.pairs, budget=args.budget)
    report(
        "pipeline", model, args, dtype=str(model.params.like.dtype),
        one_pass_over_two_pass=found["one"]["ratio"], interval=found["one"]["interval"],
        unresolved=found["one"]["unresolved"], predicted=round(1 + forward / generate, 4),
        seconds_generate=round(generate, 3), seconds_forward=round(forward, 3),
        one_pass_over_two_engines=engines, refill_over_static=refill["refill"]["ratio"],
        refill_interval=refill["refill"]["interval"],
        refill_unresolved=refill["refill"]["unresolved"],
        refill_tokens_per_second=round(int(run.lengths.sum()) / refill["refill"]["seconds"], 1),
    )


class Run:
    """Prompts for which the scheduler generates replies of predetermined lengths."""

    def __init__(self, model: Any, rows: list[Row], args: argparse.Namespace) -> None:
        self.model, self.rows, self.args = model, rows, args
        draw = np.random.default_rng(3)
        self.lengths = np.clip(draw.geometric(3 / args.new, len(rows)), 1, args.new)
        self.stops = Stops(np.full(4, -1, np.int32), np.full(2, -1, np.int32))

    def generate(self, read: Capture | None = None) -> list[np.ndarray]:
        """Generate replies of the maximum length and return their tokens."""
        return self.work(np.full(len(self.rows), self.args.new), read or Capture(), True)

    def geometric(self, refill: bool) -> list[np.ndarray]:
        """Generate replies of geometrically distributed lengths and return their tokens."""
        return self.work(self.lengths, Capture(), refill)

    def work(self, lengths: np.ndarray, read: Capture, refill: bool) -> list[np.ndarray]:
        """Run the scheduler and return the token ids of the replies."""
        count = len(self.rows)
        out: dict[int, np.ndarray] = {}

        def collect(tasks: list[Any], places: np.ndarray, state: Any) -> None:
            tokens, length, _ = jax.device_get((state.tokens, state.length,
                                                 state.carry.captured))
            for row, task in zip(places.tolist(), tasks, strict=True):
                out[task.number] = tokens[row, : length[row]]

        queue(self.model, self.rows, np.arange(count, dtype=np.uint32), lengths.astype(np.int32),
              sampling(count), Interventions(), read, self.stops, collect,
              max_new=np.full(count, self.args.new, np.int32), batch_size=self.args.batch,
              refill=refill).run()
        if any(len(out[i]) != lengths[i] for i in range(count)):
            raise RuntimeError("a reply does not have the requested length")
        return [out[i] for i in range(count)]


def appended(row: Row, tokens: np.ndarray) -> Row:
    """Append the tokens of a reply to a prompt."""
    n = tokens.size
    return Row(np.concatenate([row.tokens, tokens]),
               np.concatenate([row.kind, np.full(n, ASSISTANT, np.int32)]),
               np.concatenate([row.turn, np.full(n, int(row.turn[-1]) + 1, np.int32)]), "")


def clocked(work: Any) -> float:
    """Call `work` once and return the seconds until its results are ready."""
    begun = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
