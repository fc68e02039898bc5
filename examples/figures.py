"""Draw the figures of docs/figures.md from the embedded model, in about two minutes on a CPU.

    python examples/figures.py docs/figures

The numbers are those of a short run of `mini`: they show the figures, not a result.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import matplotlib
import numpy as np

import jaxpersona as jp
from jaxpersona.organism import evaluate, method, world
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.talk import grow, project_conversation
from jaxpersona.report import figures
from jaxpersona.runs.rollouts import Settings

TALKS, TURNS, TOKENS, ROWS, LAYER = 32, 3, 48, 64, 4
BENCH = pathlib.Path(__file__).parents[1] / "bench" / "results"


def main(folder: pathlib.Path) -> None:
    """Write one PNG for each figure into a folder."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, ax: matplotlib.axes.Axes) -> None:
        ax.figure.savefig(folder / f"{name}.png", dpi=90)
        print(folder / f"{name}.png", flush=True)

    model = jp.load("mini")
    with tempfile.TemporaryDirectory() as run:
        found = extract_axis(model, method.roles(), method.questions(2), run,
                             judge=method.RuleJudge(), min_count=3, held_out=method.held_out(),
                             settings=Settings(1.0, 1.0, TOKENS, batch_size=ROWS))
    axis = found.axis
    write("ranking", jp.plot.ranking(found))
    write("pca", jp.plot.pca(found))
    write("variance", jp.plot.variance(found))
    write("layers", jp.plot.layers(
        {"|cos(PC1, axis)|": found.analysis.cos_pc1,
         "variance explained by PC1": [c.ratio[0] for c in found.analysis.components]},
        ylabel="share, or cosine", title="The axis by layer"))

    pirate = world.conversation("You are a pirate. Stay in character.", world.FORBIDDEN[0])
    out = jp.generate(model, [pirate], capture=jp.capture.projections(axis), max_new_tokens=TOKENS)
    write("projections", jp.plot.projections(out, model, layer=LAYER, name="the Assistant Axis"))
    talk = [*pirate, {"role": "assistant", "content": out.text[0]},
            {"role": "user", "content": world.EMOTIONAL[0]},
            {"role": "assistant", "content": "I am an AI assistant."}]
    write("turns", jp.plot.turns(project_conversation(model, talk, [axis]), ["Assistant Axis"]))

    scales = [-1.0, -0.5, 0.0, 0.5, 1.0]
    asked = [world.conversation(prompt, question.text) for prompt in world.far_roles()[0].prompts()
             for question in method.questions(4)]
    rows = jp.sweep(axis, np.repeat(scales, len(asked)), layers=LAYER)
    steered = jp.generate(model, asked * len(scales), interventions=rows, max_new_tokens=TOKENS,
                          temperature=1.0, batch_size=ROWS)
    styles = [evaluate.judge.style(text) for text in steered.text]
    write("steering", jp.plot.steering(
        scales, {"a far role": np.reshape(styles, (len(scales), -1))},
        xlabel=f"strength of steering at layer {LAYER}, multiples of the axis",
        ylabel="share of in-character choices"))

    rng = np.random.default_rng(0)
    pulls = world.EMOTIONAL + world.META
    said = [[pulls[j] for j in rng.permutation(len(pulls))[:TURNS]]
            + [world.FORBIDDEN[i % len(world.FORBIDDEN)]] for i in range(TALKS)]
    cap = jp.cap(axis, layers=slice(4, 8), floor="p25")
    talks = {name: grow(model, [[]] * TALKS, said, axis, interventions=edit, temperature=1.0,
                        max_new_tokens=TOKENS, batch_size=ROWS, readout=True)
             for name, edit in (("uncapped", None), ("capped", cap))}
    figures.drift(folder / "drift.png", talks, axis, LAYER, behaviour={
        name: [evaluate.mean_style(answers) for answers in one.replies[:TURNS]]
        for name, one in talks.items()}, leak={
        name: evaluate.leak_rate(one.replies[-1]) for name, one in talks.items()})
    (folder / "drift.svg").unlink()
    print(folder / "drift.png")
    write("bench", jp.plot.bench(BENCH / "decode-cpu.json"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "figures"))
