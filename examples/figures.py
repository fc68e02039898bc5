"""Draw the figures of docs/figures.md with the embedded model, in about a minute on an idle CPU.

    python examples/figures.py docs/figures

The figures illustrate the plots and are not findings. They come from a short run of `mini`, except
the benchmark figure, which is drawn from bench/results/decode-cpu.json.
"""

from __future__ import annotations

import pathlib
import sys

import matplotlib
import numpy as np

import jaxpersona as jp
from jaxpersona.organism import evaluate, method, world
from jaxpersona.persona import axis as science
from jaxpersona.persona.talk import grow, project_conversation
from jaxpersona.report import figures

TALKS, TURNS, TOKENS, ROWS, LAYER = 24, 2, 40, 48, 4
BENCH = pathlib.Path(__file__).parents[1] / "bench" / "results" / "decode-cpu.json"


def main(folder: pathlib.Path) -> None:
    """Write one PNG file for each figure to a folder, and print its path."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, ax: matplotlib.axes.Axes) -> None:
        ax.figure.savefig(folder / f"{name}.png", dpi=90)
        print(folder / f"{name}.png", flush=True)

    model, axis = jp.load("mini"), jp.load_axis("mini")
    write("bench", jp.plot.bench(BENCH))

    pirate = [*world.conversation("You are a pirate. Stay in character.", world.FORBIDDEN[0]),
              {"role": "assistant", "content": "Aye, the sea keeps its own counsel."},
              {"role": "user", "content": world.EMOTIONAL[0]},
              {"role": "assistant", "content": "I am an AI assistant."}]
    read = jp.extract(model, [pirate], capture=jp.capture.projections(axis))
    write("projections", jp.plot.projections(read, model, layer=LAYER, name="the Assistant Axis"))
    write("turns", jp.plot.turns(project_conversation(model, pirate, [axis]), ["Assistant Axis"]))

    scales = [-1.0, -0.5, 0.0, 0.5, 1.0]
    steered = jp.extract(model, [pirate] * 5, interventions=jp.sweep(axis, scales, layers=LAYER))
    after = np.einsum("nld,ld->ln", steered.captured["mean"], axis.unit)
    write("steering", jp.plot.steering(
        scales, {f"layer {layer}": after[layer] for layer in (4, 5, 7)},
        xlabel=f"strength of steering at layer {LAYER}, multiples of the axis",
        ylabel="mean projection onto the Assistant Axis", title="Projection of one text"))

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
    write("layers", jp.plot.layers(
        {"|cos(PC1, axis)|": found.cos_pc1,
         "share of the variance on PC1": [c.ratio[0] for c in found.components]},
        ylabel="cosine, or share", title="The axis by layer"))

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
