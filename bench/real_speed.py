"""Benchmark capped generation against forward hooks in transformers, for `real_axis.py`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from common import paired

import jaxpersona as jp
from jaxpersona.engine.prompts import encode


def compare(model: jp.Model, axis: jp.Axis, layers: range, talks: list[Any],
            args: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in alternating pairs; return the ratio of their seconds (peer / ours).

    Both sides have the same weights, cap the same layers with a floor at the 25th percentile of all
    answers' projections, and greedily decode exactly `args.new` tokens per prompt. Transformers
    runs batches in the given order with left padding.
    """
    import torch
    from peers import Hooked

    endless = dataclasses.replace(model, stop_ids=())
    floors = axis.thresholds("p25", of="all")[list(layers)]
    edit = jp.cap(axis, layers=layers, floor=floors)
    rows = [encode(model, talk) for talk in talks]
    peer = Hooked(model, args.dtype)

    def ours() -> float:
        begun = time.perf_counter()
        out = jp.generate(endless, talks, interventions=edit, max_new_tokens=args.new,
                          batch_size=args.batch)
        spent = time.perf_counter() - begun
        if any(tokens.size != args.new for tokens in out.tokens):
            raise RuntimeError("a reply is shorter than --new")
        return spent

    def hooks() -> float:
        handles = peer.capped(axis.values[list(layers)], floors, layers)
        begun = time.perf_counter()
        for at in range(0, len(rows), args.batch):
            members = rows[at: at + args.batch]
            width = max(row.tokens.size for row in members)
            tokens = np.zeros((len(members), width), np.int64)
            mask = np.zeros_like(tokens)
            for b, row in enumerate(members):
                tokens[b, width - row.tokens.size:], mask[b, width - row.tokens.size:] = (
                    row.tokens, 1)
            with torch.no_grad():
                out = peer.made.generate(
                    torch.tensor(tokens, device=peer.device), max_new_tokens=args.new,
                    attention_mask=torch.tensor(mask, device=peer.device),
                    min_new_tokens=args.new, do_sample=False)
            out.cpu()
        spent = time.perf_counter() - begun
        for handle in handles:
            handle.remove()
        return spent

    found = paired({"hooks": hooks, "ours": ours}, "hooks", budget=args.budget)
    tokens = len(rows) * args.new
    return {"prompts": len(rows), "rows": args.batch, "new": args.new,
            "prompt_tokens": [int(min(r.tokens.size for r in rows)),
                              int(max(r.tokens.size for r in rows))],
            **{k: found["ours"][k] for k in ("ratio", "interval", "unresolved", "pairs")},
            "tokens_per_second": {k: round(tokens / v["seconds"], 1) for k, v in found.items()}}


