"""Compare the results of this checkout with those of another one, bit for bit.

    git worktree add /tmp/before main && python bench/same_bits.py /tmp/before

A process of each checkout runs the same work through the public functions: greedy and sampled
generation with eight kinds of interventions and a capture of means, last activations and
projections, and `extract`, for the embedded model at several batch sizes and for a small random
checkpoint of each family. The main process compares all arrays: tokens, captured activations, and
the counts of selected and changed tokens. Arrays that differ are listed with their largest
difference.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parents[1]
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
            "gemma2": "Gemma2", "gemma3": "Gemma3"}
ROLES = ("a pirate", "a ghost", "an analyst", "a shark", "a poet", "a nurse", "a king", "yourself")


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Return `count` different conversations of one to three messages."""
    found = []
    for i in range(count):
        talk = [{"role": "user", "content": f"Answer as {ROLES[i % 8]}. " + "Who are you? " * i}]
        if i % 3 == 1:
            talk = [{"role": "system", "content": f"You are {ROLES[i % 8]}."}, *talk]
        if i % 4 == 2:
            talk += [{"role": "assistant", "content": "I am what I am."},
                     {"role": "user", "content": f"Tell me more about {i}."}]
        found.append(talk)
    return found


def kinds(jp: Any, direction: Any, other: Any, layers: list[int]) -> dict[str, Any]:
    """Return one intervention of each kind."""
    cap = jp.cap(direction, layers=layers, floor=0.5)
    return {
        "none": None, "cap": cap, "steer": jp.steer(direction, layers=layers, scale=0.7),
        "ablate": jp.ablate(direction, layers=layers),
        "scale": jp.scale(direction, layers=layers, factor=0.4),
        "rotate": jp.rotate(direction, other, layers=layers, by=0.3),
        "gate": jp.gate(cap, direction, layer=0, above=-1.0),
        "chain": jp.chain(jp.steer(other, layers=layers, scale=0.5),
                          jp.restore_norm(layers=layers)),
    }


def arrays(jp: Any, model: Any, talks: list, batch: int, chosen: list[str],
           new: int) -> Iterator[tuple[str, Any]]:
    """Run the generations and extractions; yield every resulting array with its name."""
    rng = np.random.default_rng(0)
    depth, width = model.config.n_layers, model.config.d_model
    direction, other = rng.normal(size=(2, width)).astype(np.float32)
    edits = kinds(jp, direction, other, [1, depth - 1])
    read = (jp.capture.mean() | jp.capture.last()
            | jp.capture.projections(np.stack([direction, other])))
    for name in chosen:
        for way, settings in (("greedy", {}), ("sampled", {"temperature": 0.9, "top_p": 0.95,
                                                           "seed": 7})):
            out = jp.generate(model, talks, interventions=edits[name], capture=read,
                              max_new_tokens=new, batch_size=batch, **settings)
            yield from named(f"{name} {way}", out, out.tokens)
    out = jp.extract(model, talks, interventions=edits["cap"],
                     capture=jp.capture.mean(jp.everywhere) | jp.capture.last())
    yield from named("extract", out, [])


def named(label: str, out: Any, tokens: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a result; arrays of different lengths are joined."""
    yield f"{label} tokens", np.concatenate([np.asarray(row, np.int64) for row in (*tokens, [])])
    for name, value in out.captured.items():
        parts = value if isinstance(value, list) else [value]
        yield f"{label} {name}", np.concatenate([np.ravel(part) for part in parts])
    for number, table in enumerate(out.applied):
        yield f"{label} counts {number}", np.concatenate([np.ravel(table.seen),
                                                         np.ravel(table.changed)])


def save_families(folder: pathlib.Path) -> None:
    """Write a small random checkpoint of each family."""
    import torch
    import transformers

    for family, name in FAMILIES.items():
        kind = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
        config = getattr(transformers, kind)(
            vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, intermediate_size=80, max_position_embeddings=256,
            pad_token_id=0, bos_token_id=None, eos_token_id=1)
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.15)
        model.save_pretrained(folder / family)


def run(root: pathlib.Path, out: pathlib.Path, args: argparse.Namespace) -> None:
    """Run the work with the imported checkout, which must be the one in the folder `root`."""
    import jaxpersona as jp

    if root not in pathlib.Path(jp.__file__).resolve().parents:
        raise SystemExit(f"jaxpersona was imported from {jp.__file__}, which is not in {root}")
    found = {}
    model = jp.load("mini")
    for batch in args.batch:
        count = args.conversations if batch == max(args.batch) else min(16, args.conversations)
        found |= {f"mini {batch} {name}": value for name, value in arrays(
            jp, model, conversations(count), batch, args.kinds, args.new)}
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 199, n).tolist() for n in rng.integers(5, 60, 8)]
    for family in args.families:
        small = jp.load(out.parent / "families" / family)
        found |= {f"{family} {name}": value for name, value in arrays(
            jp, small, rows, 8, ["cap"], args.new)}
    np.savez(out, **found)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run both checkouts and return the numbers of arrays that are equal and that differ."""
    from compare import run_in

    places = {"this": HERE, "other": pathlib.Path(args.other).resolve()}
    with tempfile.TemporaryDirectory() as folder:
        save_families(pathlib.Path(folder) / "families")
        for name, root in places.items():
            run_in(root, __file__, "--new", str(args.new),
                   "--one", str(pathlib.Path(folder) / f"{name}.npz"),
                   "--conversations", str(args.conversations), "--kinds", *args.kinds,
                   "--batch", *map(str, args.batch), "--families", *args.families)
        with (np.load(pathlib.Path(folder) / "this.npz") as ours,
              np.load(pathlib.Path(folder) / "other.npz") as theirs):
            if set(ours.files) != set(theirs.files):
                raise SystemExit(f"only one checkout has {set(ours.files) ^ set(theirs.files)}")
            differ = {name: difference(ours[name], theirs[name]) for name in ours.files
                      if not same(ours[name], theirs[name])}
            return {"arrays": len(ours.files), "equal": len(ours.files) - len(differ),
                    "values": sum(ours[name].size for name in ours.files), "differ": differ}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def difference(a: np.ndarray, b: np.ndarray) -> float | str:
    """Return the largest difference relative to the largest value, or the two shapes."""
    if a.shape != b.shape:
        return f"{a.shape} {b.shape}"
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))


def main() -> None:
    """Run the comparison and print the results."""
    every = ["none", "cap", "steer", "ablate", "scale", "rotate", "gate", "chain"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", help="folder of the checkout to compare with")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--conversations", type=int, default=64,
                        help="number at the largest batch size; at most 16 at the others")
    parser.add_argument("--kinds", nargs="+", default=every, choices=every)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--new", type=int, default=24, help="maximum length of a reply in tokens")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run(pathlib.Path(args.other).resolve(), pathlib.Path(args.one), args)
        return
    from common import report

    report("same_bits", "mini", args, **compare(args))


if __name__ == "__main__":
    main()
