"""Benchmark generation and extraction with mixed lengths against forward hooks in transformers.

    python bench/mixed.py --model SmolLM2.gguf

In the part `generate`, the model greedily answers `--prompts` prompts of the package, one per role,
with a cap on the upper half of the layers. Every request has its own limit of `--least-new` to
`--most-new` tokens, and every reply has exactly this length, because stop tokens are ignored. The
peer is transformers, which caps with one forward hook per capped layer. It runs batches of
`--batch` prompts with left padding, and each batch runs until its longest reply ends. The arm
`hooks` runs the prompts in the given order, and the arm `sorted` runs them in the order of their
lengths.

The part `extract` computes every layer's mean over the response tokens of `--conversations`
conversations, which have random tokens and geometrically distributed lengths (`conversations.py`).
The peer runs batches of `--peer-batch` conversations, in the given order or sorted by length, with
the output head, as in the code of Lu et al. 2026.

All arms run in alternating pairs in one process (`common.paired`). `utilisation` is the mean share
of live rows in a decode step, and `prefill_efficiency` is the share of prefilled tokens that are
not padding (`Generated.stats`). `agreement` is the share of replies whose first `--compared` tokens
are equal on both sides; differences are expected where two logits are nearly equal. The output is a
table and one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import paired, report
from conversations import conversations
from peers import Hooked

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.engine.compiled import KEPT
from jaxpersona.engine.prompts import encode
from jaxpersona.runs.rollouts import opening


def role_prompts(count: int, name: str) -> list[list[dict[str, str]]]:
    """Return one conversation for each of the first `count` roles.

    The conversation of role i uses the role's prompt i modulo its number of prompts, and question i
    modulo the number of questions.
    """
    roles = [role for role in texts.load_roles(None, model_name=name) if role.name != "default"]
    questions = texts.load_questions(None)
    return [opening(role.prompts[i % len(role.prompts)], questions[i % len(questions)].text)
            for i, role in enumerate(roles[:count])]


class Generation:
    """The prompts of the part `generate`, with one method per side of the comparison."""

    def __init__(self, model: jp.Model, peer: Hooked, args: argparse.Namespace) -> None:
        config = model.config
        self.args, self.peer = args, peer
        self.model = dataclasses.replace(model, stop_ids=())
        self.rows = [encode(model, talk) for talk in role_prompts(args.prompts, "the assistant")]
        draw = np.random.default_rng(args.seed)
        self.limits = draw.integers(args.least_new, args.most_new + 1, len(self.rows))
        self.layers = range(config.n_layers // 2, config.n_layers)
        self.direction = draw.normal(size=config.d_model).astype(np.float32)
        self.edits = jp.cap(self.direction, layers=self.layers, floor=0.0)
        self.last: Any = None
        self.peer_tokens: list[np.ndarray] = []

    def ours(self) -> float:
        """Run `jp.generate` on all prompts and return the seconds."""
        begun = time.perf_counter()
        self.last = jp.generate(self.model, self.rows, interventions=self.edits,
                                max_new_tokens=self.limits.tolist(), batch_size=self.args.batch)
        spent = time.perf_counter() - begun
        if [len(tokens) for tokens in self.last.tokens] != self.limits.tolist():
            raise RuntimeError("the length of a reply differs from its limit")
        return spent

    def hooks(self, *, sort: bool) -> float:
        """Run the peer on all prompts, sorted by length if `sort` is true; return the seconds."""
        torch, peer = self.peer.torch, self.peer
        order = range(len(self.rows))
        if sort:
            order = sorted(order, key=lambda i: self.rows[i].tokens.size)
        found: dict[int, np.ndarray] = {}
        handles = peer.capped(self.direction, 0.0, self.layers)
        begun = time.perf_counter()
        for at in range(0, len(order), self.args.batch):
            members = list(order[at : at + self.args.batch])
            width = max(self.rows[i].tokens.size for i in members)
            tokens = np.zeros((len(members), width), np.int64)
            mask = np.zeros_like(tokens)
            for b, i in enumerate(members):
                n = self.rows[i].tokens.size
                tokens[b, width - n :], mask[b, width - n :] = self.rows[i].tokens, 1
            new = int(self.limits[members].max())
            with torch.no_grad():
                out = peer.made.generate(
                    torch.tensor(tokens, device=peer.device), max_new_tokens=new,
                    attention_mask=torch.tensor(mask, device=peer.device), min_new_tokens=new,
                    do_sample=False)
            found |= dict(zip(members, out[:, width:].cpu().numpy(), strict=True))
        spent = time.perf_counter() - begun
        for handle in handles:
            handle.remove()
        self.peer_tokens = [found[i][: self.limits[i]] for i in range(len(self.rows))]
        return spent

    def agreement(self) -> float:
        """Return the share of replies whose first `--compared` tokens are equal on both sides."""
        n = self.args.compared
        same = [np.array_equal(a[:n], b[:n])
                for a, b in zip(self.last.tokens, self.peer_tokens, strict=True)]
        return round(float(np.mean(same)), 3)


def programs_of(run: Callable[[], Any]) -> int:
    """Return the number of programs that a run compiles."""
    KEPT.clear()
    run()
    return len(KEPT)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of both peer arms' seconds to ours, and the seconds of all arms.

    The interval is that of `ratio`, which refers to the arm `hooks`.
    """
    ours = found["ours"]
    return {"ratio": ours["ratio"], "interval": ours["interval"],
            "unresolved": ours["unresolved"], "pairs": ours["pairs"],
            "ratio_to_sorted": round(found["sorted"]["seconds"] / ours["seconds"], 3),
            "seconds": {name: arm["seconds"] for name, arm in found.items()}}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=270)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--least-new", type=int, default=8)
    parser.add_argument("--most-new", type=int, default=128)
    parser.add_argument("--compared", type=int, default=8)
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--mean", type=int, default=150, help="mean length in tokens")
    parser.add_argument("--most", type=int, default=512, help="maximum length in tokens")
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=200, help="maximum number of pairs")
    parser.add_argument("--least", type=int, default=10, help="minimum number of pairs")
    parser.add_argument("--budget", type=float, default=600.0,
                        help="time limit per comparison in seconds")
    parser.add_argument("--parts", nargs="+", default=["generate", "extract"],
                        choices=["generate", "extract"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = jp.load(args.model, dtype=args.dtype)
    same = model if args.dtype == args.peer_dtype else jp.load(args.model, dtype=args.peer_dtype)
    peer = Hooked(same, args.peer_dtype)
    how = {"pairs": args.pairs, "least": args.least, "budget": args.budget, "judged": ("ours",)}
    result: dict[str, Any] = {}
    if "generate" in args.parts:
        run = Generation(model, peer, args)
        programs = programs_of(run.ours)
        found = paired({"hooks": lambda: run.hooks(sort=False),
                        "sorted": lambda: run.hooks(sort=True), "ours": run.ours}, "hooks", **how)
        stats, sizes = run.last.stats, [row.tokens.size for row in run.rows]
        result |= {
            "prompt_tokens": [min(sizes), max(sizes)], "new_tokens": int(run.limits.sum()),
            "generation": summary(found), "generation_programs": programs,
            "agreement": run.agreement(), "steps": stats.steps,
            "ratio_to_hf_hooks": found["ours"]["ratio"],
            "utilisation": round(stats.utilisation, 4),
            "prefill_efficiency": round(stats.prefill_efficiency, 4)}
        # print the result now, because the second part may fail
        print(result, flush=True)
    if "extract" in args.parts:
        rows = conversations(args.conversations, model.config.vocab_size, args.mean,
                             min(args.most, model.config.max_context))
        kept: dict[str, Any] = {}

        def ours() -> float:
            begun = time.perf_counter()
            kept["ours"] = jp.extract(model, rows)
            return time.perf_counter() - begun

        def theirs(sort: bool) -> float:
            begun = time.perf_counter()
            kept["peer"] = peer.means(rows, args.peer_batch, sort=sort)
            return time.perf_counter() - begun

        programs = programs_of(ours)
        found = paired({"hooks": lambda: theirs(False), "sorted": lambda: theirs(True),
                        "ours": ours}, "hooks", **how)
        mine, other = kept["ours"], kept["peer"]
        apart = np.linalg.norm(mine.captured["mean"] - other, axis=-1)
        worst = float((apart / np.linalg.norm(other, axis=-1)).max())
        result |= {
            "extraction": summary(found), "extraction_programs": programs,
            "extraction_tokens": mine.tokens,
            "extraction_efficiency": round(mine.tokens / mine.padded, 4),
            "worst_distance": round(worst, 8)}
    jax.block_until_ready(model.params.embed_vd)
    report("mixed", model, args, **result)


if __name__ == "__main__":
    main()
