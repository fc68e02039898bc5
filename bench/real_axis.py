"""Compute and evaluate the Assistant Axis of a released chat model, stage by stage.

    python bench/real_axis.py axis --model SmolLM2.gguf --out runs/smollm2 --questions 4
    python bench/real_axis.py judge --judge qwen2.5-coder.gguf --out runs/smollm2
    python bench/real_axis.py cap --model SmolLM2.gguf --out runs/smollm2 --questions 4
    python bench/real_axis.py cap_judge --judge qwen2.5-coder.gguf --out runs/smollm2
    python bench/real_axis.py speed --model SmolLM2.gguf --out runs/smollm2

A command may name several stages, which then share the loaded models. Each stage writes
`<stage>.json` to the folder, and the stages can run on different machines. The stage `axis` can be
resumed after an interruption. `bench/real_page.py` writes a page with the results.

The model answers the package's first questions in the package's 275 roles and as the default
persona, with one rollout per system prompt and question. The stage `axis` counts every answer as
fully played (judge `none`). The stage `judge` scores some answers of a sample of roles by another
model's digit probabilities (`judges.digits`) and computes the axis from the answers with score 3.
The stages `cap` and `cap_judge` (`real_caps.py`) generate answers with and without caps, measure
perplexity and capability, and score the answers. The stage `speed` compares the speed of capped
generation with that of transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np
from common import machine
from real_answers import answers, cap_layers, export, loaded, read_scores, spaced
from real_caps import cap_judge_stage, cap_stage
from real_speed import compare
from real_stats import auc, halves_of, reliability

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.judges.digits import DigitJudge
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.rollouts import Settings, opening
from jaxpersona.runs.run import Run

EXTREMES = 15  # number of roles to list at each end of the axis
COMPONENTS = 20
EXAMPLES = 6  # number of judged answers in the result


def cast(args: argparse.Namespace, name: str) -> list[texts.Role]:
    """Return the default persona and the roles, the latter with their first `--prompts` prompts.

    With `--roles`, only a random sample of the roles is returned.
    """
    roles = texts.load_roles(None, model_name=name)
    plain = next(role for role in roles if role.name == "default")
    others = [role for role in roles if role.name != "default"]
    if args.roles is not None:
        order = np.random.default_rng(0).permutation(len(others))[: args.roles]
        others = [others[i] for i in sorted(order)]
    return [plain, *(dataclasses.replace(r, prompts=r.prompts[: args.prompts]) for r in others)]


def axis_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Generate answers for every role, compute the axis, and write files for the other stages.

    All answers count as fully played.
    """
    model = loaded(args.model, args.dtype)
    roles, questions = cast(args, args.name), texts.load_questions(None)[: args.questions]
    settings = Settings(max_new_tokens=args.new, batch_size=args.batch, seed=args.seed)
    begun, last = time.perf_counter(), [0.0]

    def report(step: str, done: int, total: int, tokens: int) -> None:
        if time.perf_counter() - last[0] > 30:
            last[0] = time.perf_counter()
            print(f"{step} {done}/{total}, {tokens} tokens, {last[0] - begun:.0f} s", flush=True)

    found = extract_axis(model, roles, questions, args.out / "run", judge=NoJudge(),
                         settings=settings, min_count=args.questions, keep_means=None,
                         report=report)
    seconds = time.perf_counter() - begun
    run = Run.read(args.out / "run")
    means = {role.name: run.sample(role.name).means for role in roles}  # [n, L, D] of all answers
    halves = {role.name: halves_of(run.rollouts(role.name) or [], questions) for role in roles}
    jp.save_vector(args.out / "axis.safetensors", found.axis)
    layers = model.config.n_layers
    out = {
        "model": args.name, "layers": layers, "width": model.config.d_model,
        "roles": len(roles) - 1, "prompts": args.prompts, "questions": len(questions),
        "rollouts": found.rollouts, "tokens": found.tokens, "seconds": round(seconds, 1),
        "tokens_per_second": round(found.tokens / seconds, 1) if found.tokens else None,
        "settings": dataclasses.asdict(settings), "dtype": str(model.params.like.dtype),
        **analysis(found.default, found.analysis),
        "norm": [round(float(x), 2) for x in np.linalg.norm(found.default, axis=-1)],
        "auc": auc(means, halves), **reliability(means, halves),
        "ranking": ranking(found, layers // 2),
        "percentiles": {of: {q: [round(float(x), 4) for x in v] for q, v in table.items()}
                        for of, table in found.axis.percentiles.items()},
    }
    held: dict[str, Any] = found.projections
    np.savez_compressed(args.out / "projections.npz", **held)
    export(args, {role.name: run.rollouts(role.name) or [] for role in roles}, means)
    return out


def analysis(default: np.ndarray, found: science.Analysis) -> dict[str, Any]:
    """Return cos(PC1, axis), the norm of the axis and statistics of the PCA at every layer.

    The explained variance ratios of the first components are returned for the middle layer only.
    """
    middle = found.components[len(found.components) // 2].ratio
    return {
        "cos_pc1": [round(float(c), 4) for c in found.cos_pc1],
        "pc1_ratio": [round(float(c.ratio[0]), 4) for c in found.components],
        "components_70": [int(np.searchsorted(np.cumsum(c.ratio), 0.7) + 1)
                          for c in found.components],
        "middle_ratio": [round(float(r), 4) for r in middle[:COMPONENTS]],
        "axis_norm": [round(float(x), 3) for x in np.linalg.norm(found.axis, axis=-1)],
    }


def ranking(found: Any, layer: int) -> dict[str, Any]:
    """Rank the roles by mean projection onto the axis at a layer, in descending order.

    The result also contains the mean projections of the default persona and of the extreme roles.
    """
    order = sorted(((float(found.mean_projection(name)[layer]), name)
                    for name in found.projections if name != "default"), reverse=True)
    listed = [[name, round(value, 3)] for value, name in order]
    return {"layer": layer, "default": round(
        float(found.mean_projection("default")[layer]), 3),
        "nearest": listed[:EXTREMES], "farthest": listed[::-1][:EXTREMES],
        "order": [name for name, _ in listed]}


def judge_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Judge answers of a random sample of roles; compute an axis from the answers with score 3.

    This axis is computed from the roles with at least `--least` such answers. It is compared with
    the axis of all judged answers of the same roles and with the axis of the whole run.
    """
    held, means = answers(args), np.load(args.out / "means.npz")
    names = [name for name in held if name != "default"]
    roles = {role.name: role for role in texts.load_roles(None)}
    order = np.random.default_rng(args.seed).permutation(len(names))
    sample = sorted(names[i] for i in order[: args.judged])
    judge = DigitJudge(loaded(args.judge, args.judge_dtype))
    begun, masses, examples = time.perf_counter(), [], []
    counts: dict[str, dict[str, int]] = {}
    vectors: dict[str, np.ndarray] = {}  # role → mean over answers with score 3
    unjudged: dict[str, np.ndarray] = {}  # role → mean over all judged answers
    together = max(1, 256 // args.judged_each)  # number of roles per call of the judge
    for first in range(0, len(sample), together):
        part = sample[first: first + together]
        records = {name: [held[name][i] for i in spaced(len(held[name]), args.judged_each)]
                   for name in part}
        verdicts = read_scores(judge, [
            (roles[name], record["question"], record["conversation"][-1]["content"])
            for name in part for record in records[name]])
        masses += verdicts.mass.tolist()
        scores, expected = iter(verdicts.scores), iter(verdicts.expected)
        for name in part:
            given = [next(scores) for _ in records[name]]
            mean = [float(next(expected)) for _ in records[name]]
            counts[name] = {str(s): given.count(s) for s in (0, 1, 2, 3, None)}
            full = np.array([s == 3 for s in given])
            own = means[name].astype(np.float32)
            there = np.isfinite(own).all((1, 2))
            for chosen, least, by_role in ((full & there, args.least, vectors),
                                           (there, 1, unjudged)):
                if chosen.sum() >= least:
                    by_role[name] = own[chosen].mean(0, dtype=np.float64).astype(np.float32)
            examples.append({"role": name, "score": given[0], "expected": round(mean[0], 2),
                             "conversation": records[name][0]["conversation"]})
        print(f"judged {first + len(part)} of {len(sample)} roles, "
              f"{time.perf_counter() - begun:.0f} s", flush=True)
    plain = means["default"].astype(np.float32)
    default = plain[np.isfinite(plain).all((1, 2))].mean(0, dtype=np.float64).astype(np.float32)
    everyone = jp.load_axis(args.out / "axis.safetensors").values
    same = science.analyse(default, {name: unjudged[name] for name in vectors}).axis if (
        len(vectors) >= 2) else everyone
    total = sum(sum(each.values()) for each in counts.values())
    by_score = {s: sum(each[s] for each in counts.values()) for s in ("0", "1", "2", "3", "None")}
    played = sorted(((each["3"] / sum(each.values()), name) for name, each in counts.items()),
                    reverse=True)
    draw = np.random.default_rng(args.seed).permutation(len(examples))[:EXAMPLES]
    out: dict[str, Any] = {
        "judge": args.judge_name, "roles": len(sample), "answers": total,
        "seconds": round(time.perf_counter() - begun, 1), "scores": by_score,
        "share_played": round(by_score["3"] / max(total, 1), 4),
        "mass": round(float(np.mean(masses)), 4), "least": args.least,
        "roles_with_3": len(vectors),
        "played": [[name, round(share, 4)] for share, name in played],
        "examples": [examples[i] for i in draw],
    }
    if len(vectors) >= 2:
        found = science.analyse(default, vectors)
        out |= analysis(default, found) | {
            "cos_to_unjudged": cosines(found.axis, same),
            "cos_to_axis_of_all": cosines(found.axis, everyone),
            "cos_unjudged_to_all": cosines(same, everyone)}
    return out


def cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Return the cosine between two axes [L, D] at every layer."""
    return [round(science.cosine(x, y), 4) for x, y in zip(a, b, strict=True)]


def speed_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the speed of capped generation with that of transformers on random role prompts."""
    model, axis = loaded(args.model, args.dtype), jp.load_axis(args.out / "axis.safetensors")
    roles, questions = cast(args, args.name)[1:], texts.load_questions(None)[: args.questions]
    draw = np.random.default_rng(args.seed)
    talks = []
    for _ in range(args.speed_prompts):
        prompts = roles[draw.integers(len(roles))].prompts
        talks.append(opening(prompts[draw.integers(len(prompts))],
                             questions[draw.integers(len(questions))].text))
    return compare(model, axis, cap_layers(model), talks, args)


STAGES = {"axis": axis_stage, "judge": judge_stage, "cap": cap_stage, "cap_judge": cap_judge_stage,
          "speed": speed_stage}


def main() -> None:
    """Run one stage and write its result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--model", help="a folder, a .gguf file or a Hugging Face Hub model")
    parser.add_argument("--name", default="SmolLM2", help="name of the model in prompts")
    parser.add_argument("--judge", help="the judge model")
    parser.add_argument("--judge-name", default="Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--judge-dtype", default="bfloat16")
    parser.add_argument("--roles", type=int, help="size of a random sample of roles; default: all")
    parser.add_argument("--prompts", type=int, default=5, help="number of prompts per role")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", type=int, default=40, help="number of judged roles")
    parser.add_argument("--judged-each", type=int, default=4, help="judged answers per role")
    parser.add_argument("--least", type=int, default=1,
                        help="number of answers with score 3 that a role needs for the judged axis")
    parser.add_argument("--cap-questions", type=int, default=2)
    parser.add_argument("--ordinary", type=int, default=40)
    parser.add_argument("--speed-prompts", type=int, default=64)
    parser.add_argument("--budget", type=float, default=300,
                        help="time limit of `speed` in seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    given = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()
             if k not in ("stages", "model", "judge", "out")}
    for stage in args.stages:
        begun = time.perf_counter()
        found = STAGES[stage](args)
        result = {"stage": stage, **machine(), "date": time.strftime("%Y-%m-%d"),
                  "arguments": given, "wall_s": round(time.perf_counter() - begun, 1), **found}
        (args.out / f"{stage}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items()
                          if isinstance(v, (int, float, str))}), flush=True)


if __name__ == "__main__":
    main()
