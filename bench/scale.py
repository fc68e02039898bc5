"""Measure a run at the scale of Lu et al. 2026: 331,200 rollouts with random replies.

    python bench/scale.py --out /tmp/scale

The model has 2 layers, width 64 and random weights. All steps of a run are executed (prompts,
records, live files, verdicts, sums, samples, axis), except the generation of replies: the tokens of
a reply and its response mean are drawn at random. The resident memory of the process should not
grow after the first 1 % of the rollouts. At the end, the complete run is resumed and timed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from common import report
from jaxpersona.ckpts.files import read_entries

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.engine import prompts
from jaxpersona.engine.replies import Reply
from jaxpersona.engine.stopping import text_of
from jaxpersona.judges.protocol import ROLE_SCALE, Item, Verdict
from jaxpersona.persona import collect
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.files import MANIFEST
from jaxpersona.runs.rollouts import Settings

QWEN = (64, 5120)  # layers and width of Qwen3-32B
SKIP = False  # whether the tokenization of prompts is skipped


class Drawn:
    """A replacement for `engine.stream.Stream` that draws replies at random."""

    def __init__(self, model: Any, asked: Any, *, batch_size: int, max_new_tokens: int,
                 seed: int, **_: Any) -> None:
        self.model, self.asked, self.rows = model, iter(asked), batch_size
        self.longest, self.rng = max_new_tokens, np.random.default_rng(seed)
        self.tokens, self.done = 0, False
        self.shape = (model.config.n_layers, model.config.d_model)

    def step(self) -> list[tuple[Any, Reply]]:
        """Return the next replies, at most one per row."""
        found = []
        for tag, conversation, _ in self.asked:
            row: Any = None if SKIP else prompts.encode(self.model, conversation)
            count = int(self.rng.integers(self.longest // 2, self.longest))
            tokens = self.rng.integers(300, 1000, count).astype(np.int32)
            self.tokens += count
            mean = self.rng.normal(len(tag[0]), 1.0, self.shape).astype(np.float32)
            found.append((tag, Reply(text_of(self.model.tokenizer, tokens), tokens, "length", row,
                                     {"mean": mean}, ())))
            if len(found) == self.rows:
                return found
        self.done = True
        return found


class LengthRule:
    """A judge whose score depends only on the number of characters in the reply."""

    name, scale = "rule of length", ROLE_SCALE

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item."""
        for item in items:
            yield Verdict(item.key, 3 if len(item.answer) % 8 else len(item.answer) // 8 % 3)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def size(folder: pathlib.Path, *parts: str) -> int:
    """Return the total size in bytes of the files in a folder, or only in the given subfolders."""
    return sum(p.stat().st_size for p in folder.rglob("*")
               if p.is_file() and (not parts or p.relative_to(folder).parts[0] in parts))


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True,
                        help="the run folder; an existing run folder is deleted first")
    parser.add_argument("--roles", type=int, default=275)
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--skip-encoding", action="store_true", help=(
        "skip the tokenization of prompts, which takes most of the time"))
    args = parser.parse_args()
    global SKIP
    SKIP = args.skip_encoding
    if args.out.exists() and not (args.out / MANIFEST).exists():
        raise SystemExit(f"{args.out} exists and contains no run; give another --out")
    shutil.rmtree(args.out, ignore_errors=True)
    mini = jp.load("mini")
    model = narrow(mini)
    cast = texts.load_roles(None, model_name="Model")
    plain = [role for role in cast if role.name == "default"]
    cast = plain + [role for role in cast if role.name != "default"][: args.roles]
    asked = texts.load_questions(None)[: args.questions]
    settings = Settings(max_new_tokens=args.new, batch_size=args.batch)
    collect.Stream = Drawn  # type: ignore[misc, assignment]
    seen: list[tuple[float, int, int]] = []  # seconds, rollouts, resident bytes
    largest, ended, state = [0], threading.Event(), [0]
    begun = time.perf_counter()

    def watch() -> None:
        while not ended.wait(2.0):
            seen.append((time.perf_counter() - begun, state[0], resident()))
            largest[0] = max(largest[0], size(args.out, "live"))

    def tell(step: str, done: int, total: int, tokens: int) -> None:
        if step == "rollouts":
            state[0] = done

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    found = extract_axis(model, cast, asked, args.out, judge=LengthRule(), settings=settings,
                         report=tell)
    seconds = time.perf_counter() - begun
    ended.set()
    thread.join()
    start = time.perf_counter()
    again = extract_axis(model, cast, asked, args.out, judge=LengthRule(), settings=settings)
    resumed = time.perf_counter() - start
    count = found.rollouts
    early = [memory for _, done, memory in seen if 0.01 * count <= done <= 0.1 * count]
    late = [memory for _, done, memory in seen if done >= 0.9 * count] or [seen[-1][2]]
    layers, width = model.config.n_layers, model.config.d_model
    scale = QWEN[0] * QWEN[1] / (layers * width)
    arrays = sum(entry.size for path in args.out.rglob("*.safetensors")
                 for entry in read_entries(path)[0].values())
    words = size(args.out) - arrays  # texts and headers, whose size does not depend on the model
    store = count * QWEN[0] * QWEN[1] * 4
    report(
        "scale", model, args, rollouts=count, roles=len(cast), seconds=round(seconds, 1),
        rollouts_per_second=round(count / seconds, 1),
        resident_mb_at_1_to_10_percent=round(np.median(early or [seen[0][2]]) / 1e6, 1),
        resident_mb_at_90_to_100_percent=round(np.median(late) / 1e6, 1),
        resident_mb_most=round(max(m for *_, m in seen) / 1e6, 1),
        live_mb_most=round(largest[0] / 1e6, 2), resume_seconds=round(resumed, 2),
        resume_generated=again.tokens,
        bytes_rollouts=size(args.out, "rollouts"), bytes_scores=size(args.out, "scores"),
        bytes_samples=size(args.out, "samples"), bytes_sums=size(args.out, "sums"),
        bytes_vectors=size(args.out, "vectors"), bytes_all=size(args.out),
        text_bytes_per_rollout=round(size(args.out, "rollouts") / count, 1),
        qwen3_32b_store_gb=round(store / 1e9, 1),
        qwen3_32b_gb=round((words + arrays * scale) / 1e9, 2),
        qwen3_32b_share=round((words + arrays * scale) / store, 5),
        kept_means=sum(len(v) for v in found.projections.values()),
    )


def narrow(mini: Any) -> Any:
    """Return a model with 2 layers, width 64, random weights and the tokenizer of `mini`."""
    import jax.numpy as jnp

    from jaxpersona.models.params import fingerprint, layout

    config = dataclasses.replace(
        mini.config, n_layers=2, d_model=64, windows=mini.config.windows[:2], max_context=2048)
    import jax

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: jnp.asarray(rng.normal(0, 0.1, spec.shape), jnp.float32),
                          layout(config), is_leaf=lambda x: hasattr(x, "init"))
    return dataclasses.replace(mini, config=config, params=params, name="random 2 × 64",
                               fingerprint=fingerprint(config, params))


if __name__ == "__main__":
    main()
