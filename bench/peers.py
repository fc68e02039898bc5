"""Benchmark capped generation against forward hooks in transformers, on the same machine.

    python bench/peers.py --model mini --batch 1 8 32

Both sides run the same prompts, cap the same layers with the same vector and threshold, and
greedily decode the same number of tokens. Times include the prefill, and runs alternate. The peer
is transformers, which caps with one forward hook per capped layer, as in the code of Lu et al.
2026. Each side uses its fastest dtype from `--dtypes` and `--peer-dtypes`. The peer has three other
variants (`--forms`): `plain` without a cap, `static` with hooks and a static cache, and `compiled`
with hooks, a static cache and `torch.compile`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import paired, report
from decoding import PROMPT, Decoding

import jaxpersona as jp
from jaxpersona.models.families import to_hf


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=40.0,
                        help="time limit per batch size in seconds")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--peer-dtypes", nargs="+", default=["float32"])
    parser.add_argument("--forms", nargs="*", default=["plain"],
                        choices=["plain", "static", "compiled"])
    args = parser.parse_args()
    ours = [jp.load(args.model, dtype=dtype) for dtype in args.dtypes]
    same = dict(zip(args.dtypes, ours, strict=True))
    theirs = [Hooked(same.get(dtype) or jp.load(args.model, dtype="float32"), dtype)
              for dtype in args.peer_dtypes]
    config = ours[0].config
    layers = range(config.n_layers // 2, config.n_layers)
    direction = np.random.default_rng(0).normal(size=config.d_model)
    edits = jp.cap(direction, layers=layers, floor=1e3)
    by_batch: dict[str, Any] = {}
    for rows in args.batch:
        arms: dict[str, Callable[[], float]] = {}
        settings = [Decoding(model, rows, args.new - 1) for model in ours]
        for setting, dtype in zip(settings, args.dtypes, strict=True):
            arms[f"jaxpersona {dtype}"] = setting.timer(edits, prompts=True)
        for peer in theirs:
            for form in ("hooks", *args.forms):
                arms[f"{form} {peer.dtype}"] = peer.generation(
                    settings[-1].prompts, args.new, form=form, direction=direction, floor=1e3,
                    layers=layers)
        own, best = fastest(arms, "jaxpersona"), fastest(arms, "hooks")
        forms = {form: fastest(arms, form) for form in args.forms}
        found = paired({"hooks": arms[best], "ours": arms[own],
                        **{form: arms[name] for form, name in forms.items()}}, "hooks",
                       pairs=args.pairs, budget=args.budget, judged=("ours",))
        by_batch[str(rows)] = {
            "ratio": found["ours"]["ratio"], "interval": found["ours"]["interval"],
            "unresolved": found["ours"]["unresolved"], "pairs": found["ours"]["pairs"],
            "ours": own, "peer": best,
            "tokens_per_second": {name: round(rows * args.new / arm["seconds"], 1)
                                  for name, arm in found.items()},
            "ratio_to_forms": {form: round(found["ours"]["ratio"] / found[form]["ratio"], 3)
                               for form in forms},
        }
        # print the result now, because a later batch size may fail
        print(f"batch {rows}: {by_batch[str(rows)]}", flush=True)
    report("peers", ours[0], args, prompt_tokens=PROMPT,
           capped_layers=f"{layers.start}:{layers.stop}",
           ratio_to_hf_hooks={n: found["ratio"] for n, found in by_batch.items()},
           by_batch=by_batch)


def fastest(arms: dict[str, Callable[[], float]], side: str) -> str:
    """Return the name of one side's fastest arm, by the best of three runs after a warm-up run."""
    names = [name for name in arms if name.split()[0] == side]
    if len(names) == 1:
        return names[0]
    return min(names, key=lambda name: min([arms[name]() for _ in range(4)][1:]))


class Hooked:
    """A transformers model with the weights of a JAX model and with forward hooks for caps."""

    def __init__(self, model: Any, dtype: str, device: str | None = None) -> None:
        import torch
        from jaxpersona.ckpts import names
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch, self.dtype = torch, dtype
        self.device = device or ("cuda" if jax.default_backend() == "gpu" else "cpu")
        raw = {**to_hf(model.config), "dtype": dtype}
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        # annotated as Any, because the type stubs of `to` and `generate` are too narrow
        with torch.device(self.device):
            made: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        # the weights share memory with the JAX arrays if the dtypes are equal
        weights = {name: torch.from_dlpack(array).reshape(tensor.shape).to(made.dtype)
                   for name, (tensor, array) in names.named(model.params, model.config).items()}
        missing, unknown = made.load_state_dict(weights, strict=False, assign=True)
        if unknown or set(missing) - {"lm_head.weight"} or (
                missing and not model.config.tied_embeddings):
            raise RuntimeError(f"weights missing for the peer: {missing}; unexpected: {unknown}")
        made.tie_weights()
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = 0
        self.made = made.to(self.device).eval()

    def capped(self, direction: np.ndarray, floor: Any, layers: range) -> list[Any]:
        """Register hooks that cap layers, h ← h − v̂·min(⟨h, v̂⟩ − τ, 0); return the handles.

        Args:
          direction: v, [D] or one per layer [l, D]; v̂ = v / ‖v‖.
          floor: τ, a number or one per layer [l].
          layers: the l layers to cap.
        """
        torch = self.torch

        def hook_of(v: np.ndarray, bound: float) -> Callable[..., Any]:
            unit = torch.tensor(v / np.linalg.norm(v), dtype=self.made.dtype, device=self.device)

            def hook(module: Any, args: Any, output: Any) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                h = h - unit * torch.clamp((h @ unit)[..., None] - bound, max=0)
                return (h, *output[1:]) if isinstance(output, tuple) else h

            return hook

        directions = np.broadcast_to(direction, (len(layers), np.shape(direction)[-1]))
        floors = np.broadcast_to(floor, len(layers))
        return [self.made.model.layers[i].register_forward_hook(hook_of(v, float(bound)))
                for i, v, bound in zip(layers, directions, floors, strict=True)]

    def generation(self, prompts: np.ndarray, new: int, *, form: str, direction: np.ndarray,
                   floor: float, layers: range) -> Callable[[], float]:
        """Return a function that times greedy generation of `new` tokens per prompt."""
        torch = self.torch
        tokens = torch.tensor(prompts, device=self.device)
        how: dict[str, Any] = {}
        if form in ("static", "compiled"):
            how = {"cache_implementation": "static", "disable_compile": form == "static"}

        def once() -> float:
            handles = [] if form == "plain" else self.capped(direction, floor, layers)
            begun = time.perf_counter()
            with torch.no_grad():
                out = self.made.generate(tokens, attention_mask=torch.ones_like(tokens),
                                         max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                         **how)
            out.cpu()
            spent = time.perf_counter() - begun
            for handle in handles:
                handle.remove()
            if out.shape[1] != tokens.shape[1] + new:
                raise RuntimeError(f"new tokens: {out.shape[1] - tokens.shape[1]}, expected: {new}")
            return spent

        return once

    def means(self, rows: list[Any], size: int, *, sort: bool, head: bool = True) -> np.ndarray:
        """Return every layer's mean over response tokens, [N, L, D] float32, captured with hooks.

        Args:
          rows: the N conversations (`chat.Row`).
          size: the batch size.
          sort: whether to sort conversations by length.
          head: whether to run the output head, as in the code of Lu et al. 2026.
        """
        from jaxpersona.models.batch import ASSISTANT

        torch, found = self.torch, {}
        order = np.argsort([-r.tokens.size for r in rows], kind="stable") if sort else range(
            len(rows))
        kept: list[Any] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(keep) for layer in self.made.model.layers]
        run = self.made if head else self.made.model
        for at in range(0, len(rows), size):
            members = [int(i) for i in order[at : at + size]]
            width = max(rows[i].tokens.size for i in members)
            tokens = np.zeros((len(members), width), np.int64)
            mask, chosen = tokens.copy(), np.zeros(tokens.shape, bool)
            for b, i in enumerate(members):
                n = rows[i].tokens.size
                tokens[b, :n], mask[b, :n] = rows[i].tokens, 1
                chosen[b, :n] = (rows[i].kind & ASSISTANT) != 0
            with torch.no_grad():
                run(torch.tensor(tokens, device=self.device),
                    attention_mask=torch.tensor(mask, device=self.device), use_cache=False)
                stream = torch.stack(kept)  # [L, B, T, D]
                kept.clear()
                for b, i in enumerate(members):
                    where = torch.tensor(chosen[b], device=self.device)
                    found[i] = stream[:, b, where].float().mean(1).cpu().numpy()
            del stream
        for handle in handles:
            handle.remove()
        return np.stack([found[i] for i in range(len(rows))])


if __name__ == "__main__":
    main()
