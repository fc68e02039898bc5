"""The stages of `real_axis.py` that measure the effects and the costs of caps."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from real_answers import answers, cap_layers, loaded, read_scores
from real_questions import QUESTIONS, correct

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.judges.digits import DigitJudge
from jaxpersona.runs.rollouts import opening

FARTHEST = 20  # number of roles for which caps are tested: those with the lowest projections
# name of a column → (the projections whose 25th percentile is the floor, whether it is a control)
ARMS = {
    "none": None, "cap": ("all", False), "control": ("all", True),
    "high cap": ("default", False), "high control": ("default", True)}


def cap_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Compare answers, perplexity and capability without a cap, with caps, and with controls.

    A cap is a floor at the 25th percentile of the projections of all answers or, for the high cap,
    of the default persona's answers. A control moves each activation as far as its cap would move
    it, but along one random direction per layer.
    """
    model = loaded(args.model, args.dtype)
    axis = jp.load_axis(args.out / "axis.safetensors")
    order = json.loads((args.out / "axis.json").read_text())["ranking"]["order"]
    layers = cap_layers(model)
    roles = {role.name: role for role in texts.load_roles(None)}
    named = [name for name in order[::-1] if name in roles][:FARTHEST]
    asked = texts.load_questions(None)[args.questions: args.questions + args.cap_questions]
    random = np.random.default_rng(args.seed).normal(size=(1, len(layers), axis.values.shape[1]))
    prompts = [(name, q.text, opening(roles[name].prompts[0], q.text))
               for name in named for q in asked]
    ordinary = answers(args)["default"]
    talks = [r["conversation"] for r in ordinary if r["conversation"][-1]["content"]]
    talks = talks[: args.ordinary]
    out: dict[str, Any] = {"layers": [layers.start, layers.stop], "floors": ARMS,
                           "roles": named, "questions": len(asked), "answers": len(prompts),
                           "ordinary": len(talks), "capability_questions": len(QUESTIONS),
                           "arms": {}}
    options: dict[str, Any] = {"max_new_tokens": args.new, "batch_size": args.batch,
                               "seed": args.seed}
    replies = {}
    for name, kind in ARMS.items():
        begun = time.perf_counter()
        edit = None
        if kind is not None:
            floors = axis.thresholds("p25", of=kind[0])[list(layers)]
            edit = jp.cap(axis, layers=layers, floor=floors, push=random if kind[1] else None)
        made = jp.generate(model, [talk for *_, talk in prompts], interventions=edit,
                           temperature=0.7, top_p=0.9, **options)
        replies[name] = made.text
        bound = jp.logprobs(model, talks, interventions=edit).perplexity(jp.response)
        short: dict[str, Any] = options | {"max_new_tokens": 24}
        given = jp.generate(model, [q for q, _ in QUESTIONS], interventions=edit, **short).text
        right = [correct(answer, wanted)
                 for answer, (_, wanted) in zip(given, QUESTIONS, strict=True)]
        changed = 0.0  # the share of (capped layer, token) pairs whose activation was changed
        if made.applied:
            counts = made.applied[0]
            changed = float(counts.changed.sum() / (len(counts.changed) * counts.seen.sum()))
        out["arms"][name] = {"perplexity": round(bound, 4), "correct": int(sum(right)),
                             "changed_share": round(changed, 4),
                             "seconds": round(time.perf_counter() - begun, 1)}
        print(name, out["arms"][name], flush=True)
    out["replies"] = [{"role": name, "question": q,
                       **{arm: texts_[i] for arm, texts_ in replies.items()}}
                      for i, (name, q, _) in enumerate(prompts)]
    return out


def cap_judge_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Score the answers of the stage `cap`, at most `--judged-each` per arm and role."""
    made = json.loads((args.out / "cap.json").read_text())
    roles = {role.name: role for role in texts.load_roles(None)}
    judge = DigitJudge(loaded(args.judge, args.judge_dtype))
    out: dict[str, Any] = {"judge": args.judge_name, "each": args.judged_each, "arms": {}}
    chosen = [reply for name in made["roles"]
              for reply in [r for r in made["replies"] if r["role"] == name][: args.judged_each]]
    for arm in made["arms"]:
        verdicts = read_scores(judge, [(roles[r["role"]], r["question"], r[arm]) for r in chosen])
        scores = verdicts.scores
        out["arms"][arm] = {
            "share_played": round(float(np.mean([s == 3 for s in scores])), 4),
            "expected_score": round(float(np.mean(verdicts.expected)), 4),
            "scores": {str(s): scores.count(s) for s in (0, 1, 2, 3, None)},
            **against(verdicts.expected, out, arm)}
        out["arms"][arm]["expected"] = [round(float(x), 4) for x in verdicts.expected]
        print(arm, out["arms"][arm]["scores"], flush=True)
    for arm in out["arms"].values():
        del arm["expected"]
    return out


def against(expected: np.ndarray, out: dict[str, Any], arm: str) -> dict[str, Any]:
    """Return the mean change of the expected score from "none", with its bootstrap 95 % interval.

    The bootstrap resamples the answers, which are paired by role and question.
    """
    if arm == "none":
        return {}
    change = expected - np.array(out["arms"]["none"]["expected"])
    draws = np.random.default_rng(0).integers(0, len(change), (2000, len(change)))
    low, high = np.quantile(change[draws].mean(-1), [0.025, 0.975])
    return {"change": round(float(change.mean()), 4),
            "interval": [round(float(low), 4), round(float(high), 4)]}
