"""Draw the figures of docs/figures.md with the embedded model, in about a minute on an idle CPU.

    python examples/figures.py docs/figures

The figures illustrate the plots and are not findings. They come from a short run of `mini`, except
the benchmark figure, which is drawn from bench/results/decode-cpu.json.
"""

from __future__ import annotations

import json
import pathlib
import sys

import matplotlib
import numpy as np

import jaxpersona as jp
from jaxpersona.organism import evaluate, judge, method, world
from jaxpersona.persona import axis as science
from jaxpersona.persona.reference import reference
from jaxpersona.persona.talk import grow, project_conversation
from jaxpersona.report import figures
from jaxpersona.report.messages import messages

TALKS, TURNS, TOKENS, ROWS, LAYER = 24, 2, 40, 48, 4
BENCH = pathlib.Path(__file__).parents[1] / "bench" / "results" / "decode-cpu.json"


def drifting(model: jp.Model) -> list[dict[str, str]]:
    """Return a conversation in which the persona drifts: the replies of `mini`, turn by turn."""
    talk: list[dict[str, str]] = []
    for question in ("Tell me about the sea.", world.EMOTIONAL[0], world.META[0], world.META[5]):
        talk.append({"role": "user", "content": question})
        reply = jp.generate(model, [talk], max_new_tokens=TOKENS, temperature=1.0).text[0]
        talk.append({"role": "assistant", "content": reply})
    return talk


def main(folder: pathlib.Path) -> None:
    """Write one PNG file for each figure to a folder, and print its path."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, ax: matplotlib.axes.Axes) -> None:
        ax.figure.savefig(folder / f"{name}.png", dpi=90)
        print(folder / f"{name}.png", flush=True)

    model, axis = jp.load("mini"), jp.load_axis("mini")
    found = json.loads(BENCH.read_text())
    write("bench", jp.plot.bench({f"{found['model']}, {found['cores']} CPU cores": found}))

    talk = drifting(model)
    read = jp.extract(model, [talk], capture=jp.capture.projections(axis))
    write("projections", jp.plot.projections(read, model, layer=LAYER, name="the Assistant Axis",
                                             axis=axis, centre=axis.thresholds("p25")[LAYER]))
    write("turns", jp.plot.turns(project_conversation(model, talk, [axis]), ["Assistant Axis"],
                                 axis=axis, floor="p25"))
    found = project_conversation(model, talk, [axis])
    messages(folder / "messages.png", [one.turn for one in found],
             np.stack([one.values[LAYER] for one in found]), ["the Assistant Axis"], LAYER,
             [reference(axis, LAYER)])
    (folder / "messages.svg").unlink()
    print(folder / "messages.png")

    plain = [world.conversation(None, question.text) for question in method.questions(8)]
    played = [world.conversation(f"You are {role}.", question.text)
              for role in ("a pirate", "a jester", "a prophet", "a ghost")
              for question in method.questions(8)]
    vector = jp.contrast(model, played, plain)
    scales = np.linspace(-0.6, 0.6, 7)
    rows = jp.sweep(vector, np.repeat(scales, len(plain)), layers=LAYER)
    steered = jp.generate(model, plain * len(scales), interventions=rows, max_new_tokens=TOKENS,
                          temperature=1.0, batch_size=len(plain) * len(scales))
    measured = {"in-character choices": judge.style, "words of known sentences": judge.recognised}
    write("steering", jp.plot.steering(
        scales, {name: np.array([measure(text) for text in steered.text]).reshape(len(scales), -1)
                 for name, measure in measured.items()},
        xlabel=f"strength of a vector toward roles, at layer {LAYER}",
        ylabel="share in a reply", title="Effect of steering on replies"))

    names, talks = [], []
    for role in method.roles():
        for prompt in role.prompts[:2]:
            for question in method.questions(2):
                names.append(role.name)
                talks.append(world.conversation(prompt, question.text))
    out = jp.generate(model, talks, capture=jp.capture.mean(jp.response), max_new_tokens=TOKENS,
                      temperature=1.0, batch_size=ROWS)
    means = {role: out.captured["mean"][np.array(names) == role] for role in names}
    vectors = {role: np.nanmean(value, 0) for role, value in means.items()}
    default = vectors.pop("default")
    found = science.analyse(default, vectors)
    write("ranking", jp.plot.ranking({role: science.project(value, found.axis)
                                      for role, value in means.items()}))
    write("pca", jp.plot.pca(found, default=default))
    write("variance", jp.plot.variance(found))
    ax = jp.plot.layers(
        {"|cos(PC1, axis)|": found.cos_pc1,
         "share of the variance on PC1": [c.ratio[0] for c in found.components]},
        ylabel="cosine, or share", title="The axis by layer")
    ax.set_ylim(0, 1.02)
    write("layers", ax)

    rng = np.random.default_rng(0)
    pulls = world.EMOTIONAL + world.META
    said = [[pulls[j] for j in rng.permutation(len(pulls))[:TURNS]]
            + [world.FORBIDDEN[i % len(world.FORBIDDEN)]] for i in range(TALKS)]
    arms = {"uncapped": None, "capped": jp.cap(axis, layers=slice(4, 8), floor="p25")}
    rows = jp.stack_rows([edit for edit in arms.values() for _ in said])
    both = grow(model, [[]] * len(said) * 2, said * 2, axis, interventions=rows, temperature=1.0,
                max_new_tokens=TOKENS, batch_size=ROWS, readout=True)
    parts = dict(zip(arms, (both.arm(0, TALKS), both.arm(TALKS, 2 * TALKS)), strict=True))
    figures.drift(folder / "drift.png", parts, axis, LAYER, behaviour={
        name: [evaluate.mean_style(answers) for answers in one.replies[:TURNS]]
        for name, one in parts.items()}, leak={
        name: evaluate.leak_rate(one.replies[-1]) for name, one in parts.items()})
    (folder / "drift.svg").unlink()
    print(folder / "drift.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "figures"))
