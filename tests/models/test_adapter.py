"""LoRA adapters, compared with a NumPy reference and with peft."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import adapter, hf, names
from jaxpersona.ckpts.tokenizer import warn_unused_template
from safetensors.numpy import load_file, save_file

import jaxpersona as jp
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward
from jaxpersona.models.weight import LowRank

pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = s.tiny_config(vocab_size=128, n_heads=4, n_kv_heads=2)
ROWS = batch([[5, 6, 7, 8, 9], [3, 4]])
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(folder, projections=ALL, rank=4, dtype=np.float32, rename=lambda n: n, **settings):
    """Write an adapter with random factors; return {tensor name: (A, B)}."""
    rng = np.random.default_rng(0)
    pairs, stored = {}, {}
    for tensor in jax.tree.leaves(names.tensors(CONFIG)):
        if tensor.spec.inner and any(f".{p}." in tensor.name for p in projections):
            out, width = tensor.shape
            own = settings.get("ranks", {}).get(tensor.name, rank)
            a = rng.normal(size=(own, width)).astype(dtype)
            b = (rng.normal(size=(out, own)) * 0.1).astype(dtype)
            pairs[tensor.name] = a, b
            base = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            stored[rename(f"{base}.lora_A.weight")] = a
            stored[rename(f"{base}.lora_B.weight")] = b
    settings.pop("ranks", None)
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(projections),
           **settings}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    hf.save(folder, s.random_params(CONFIG), CONFIG)
    return folder


def reference(base, pairs, scales):
    """Return the weights of the merged model by tensor name, in float64."""
    stored = {n: np.asarray(a, np.float64) for n, (_, a) in names.named(
        jp.load(base).params, CONFIG).items()}
    shapes = {t.name: t.shape for t in jax.tree.leaves(names.tensors(CONFIG))}
    return {n: w.reshape(shapes[n]) + (
        scales(n) * pairs[n][1].astype(np.float64) @ pairs[n][0].astype(np.float64)
        if n in pairs else 0) for n, w in stored.items()}


def merged_logits(base, weights):
    tensors, tree = jax.tree.flatten(names.tensors(CONFIG))
    params = tree.unflatten([jnp.asarray(weights[t.name].reshape(t.spec.shape), jnp.float32)
                             for t in tensors])
    return forward(params, CONFIG, ROWS).logits


def test_a_file_in_float16_with_the_name_of_the_adapter_and_without_its_scale(tmp_path):
    """PEFT's default of lora_alpha is 8; factors are read and scaled in float32."""
    pairs = write(tmp_path / "a", ("o_proj",), dtype=np.float16,
                  rename=lambda n: n.replace(".weight", ".default.weight"))
    place = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(place.read_text())
    del raw["lora_alpha"]
    place.write_text(json.dumps(raw))
    updates = adapter.read_adapter(tmp_path / "a", CONFIG)
    assert set(updates) == set(pairs) and len(pairs) == CONFIG.n_layers
    for name, (a, b) in pairs.items():
        np.testing.assert_array_equal(updates[name].a, a.astype(np.float32))
        np.testing.assert_array_equal(updates[name].b, 2 * b.astype(np.float32))
        assert updates[name].a.dtype == updates[name].b.dtype == np.float32


def test_an_untied_head_is_updated_too(tmp_path):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 32), (128, 2)))
    params = s.random_params(CONFIG)
    found = adapter.merged(params, CONFIG, {names.HEAD: adapter.Pair(a, b)})
    np.testing.assert_allclose(found.head_vd - params.head_vd, b @ a, atol=1e-5)
    assert found.embed_vd is params.embed_vd and found.layers == params.layers
    kept = adapter.attached(params, CONFIG, {names.HEAD: adapter.Pair(a, b)})
    assert isinstance(kept.head_vd, LowRank) and kept.head_vd.base is params.head_vd
    save_file({f"base_model.model.lm_head.lora_{k}.weight": x for k, x in (("A", a), ("B", b))},
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    update = adapter.read_adapter(tmp_path, CONFIG)[names.HEAD]
    np.testing.assert_array_equal(update.b, 2 * b)
    with pytest.raises(jp.UserError, match="lm_head.lora_A.weight: the model has no separate out"):
        adapter.read_adapter(tmp_path, dataclasses.replace(CONFIG, tied_embeddings=True))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("projections", [ALL, ("q_proj", "v_proj")])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_the_reference(base, tmp_path, projections, rslora, merge):
    pairs = write(tmp_path / "a", projections, use_rslora=rslora)
    wanted = merged_logits(base, reference(
        base, pairs, lambda n: 8 / (math.sqrt(4) if rslora else 4)))
    model = jp.load(base, adapter=tmp_path / "a", merge=merge)
    got = forward(model.params, CONFIG, ROWS).logits
    for row, n in enumerate((5, 2)):
        assert s.relative(got[row, :n], wanted[row, :n]).max() < 1e-4
    plain = forward(jp.load(base).params, CONFIG, ROWS).logits
    assert s.relative(got[0], plain[0]).max() > 0.05  # the adapter has an effect
    kept = [x for x in jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, LowRank))
            if isinstance(x, LowRank)]
    assert len(kept) == (0 if merge else len(pairs))


def test_patterns_set_the_rank_and_scale_of_single_modules(base, tmp_path):
    first = "model.layers.0.self_attn.q_proj.weight"
    pairs = write(tmp_path / "a", ranks={first: 2},
                  rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj_": 7},
                  alpha_pattern={r"layers\.[12]\.mlp\.(up|down)_proj": 3.0})
    assert pairs[first][0].shape[0] == 2

    def scale(name):
        alpha = 3 if re.search(r"layers\.[12]\.mlp\.(up|down)_proj", name) else 8
        return alpha / (2 if name == first else 4)

    wanted = merged_logits(base, reference(base, pairs, scale))
    got = forward(jp.load(base, adapter=tmp_path / "a").params, CONFIG, ROWS).logits
    assert s.relative(got[0], wanted[0]).max() < 1e-4


def test_the_first_of_several_matching_patterns_applies(base, tmp_path):
    """As in PEFT, whichever of them is the more precise one."""
    ranks = {f"model.layers.{i}.self_attn.q_proj.weight": 2 if i == 0 else 3
             for i in range(CONFIG.n_layers)}
    assert len(ranks) > 1
    pairs = write(tmp_path / "a", ranks=ranks,
                  rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 3},
                  alpha_pattern={"q_proj": 5, "layers.0.self_attn.q_proj": 40})

    def scale(name):
        return 5 / ranks[name] if name in ranks else 8 / 4

    wanted = merged_logits(base, reference(base, pairs, scale))
    got = forward(jp.load(base, adapter=tmp_path / "a").params, CONFIG, ROWS).logits
    assert s.relative(got[0], wanted[0]).max() < 1e-4


@pytest.mark.parametrize(("mesh", "merge"), [
    (dict(model=2), True), (dict(model=4, data=2), False),
    *(pytest.param(mesh, merge, marks=pytest.mark.slow) for mesh, merge in (
        (dict(model=2), False), (dict(model=4, data=2), True), (dict(fsdp=2, model=2), True),
        (dict(fsdp=2, model=2), False)))])
def test_a_mesh_gives_the_same(base, tmp_path, merge, mesh):
    write(tmp_path / "a")
    alone = jp.load(base, adapter=tmp_path / "a", merge=merge)
    size = math.prod(mesh.values())
    spread = jp.load(base, adapter=tmp_path / "a", merge=merge,
                     mesh=make_mesh(**mesh, devices=jax.devices()[:size]))
    rows = batch([[5, 6, 7, 8, 9]] * 4)
    wanted = jax.jit(forward, static_argnums=1)(alone.params, CONFIG, rows).logits
    got = jax.jit(forward, static_argnums=1)(spread.params, CONFIG, rows).logits
    assert s.relative(jax.device_get(got), wanted).max() < 1e-5


@pytest.mark.parametrize("merge", [True, False])
def test_generation_capping_and_the_fingerprint_use_the_adapter(base, tmp_path, merge):
    write(tmp_path / "a")
    plain, model = jp.load(base), jp.load(base, adapter=tmp_path / "a", merge=merge)
    assert model.fingerprint != plain.fingerprint and model.fingerprint[:8] == plain.fingerprint[:8]
    assert model.name.endswith("model+a")
    prompts = s.prompts((5, 9))
    edits = jp.cap(np.ones(CONFIG.d_model), layers=[1], floor=0.5)
    one, many = (jp.generate(model, prompts, interventions=edits, max_new_tokens=6,
                             batch_size=n).tokens for n in (2, 8))
    assert s.same_bits(one, many)
    before = jp.generate(plain, prompts, interventions=edits, max_new_tokens=6, batch_size=2).tokens
    assert not s.same_bits(one, before)


def test_bfloat16_weights_are_summed_in_float32(base, tmp_path):
    pairs = write(tmp_path / "a")
    wanted = reference(base, pairs, lambda n: 2.0)
    model = jp.load(base, adapter=tmp_path / "a", dtype="bfloat16")
    base16 = names.named(jp.load(base, dtype="bfloat16").params, CONFIG)
    for name, (tensor, got) in names.named(model.params, CONFIG).items():
        if name in pairs:
            exact = np.asarray(base16[name][1], np.float32).reshape(tensor.shape) + (
                2.0 * pairs[name][1] @ pairs[name][0])
            rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
            assert np.array_equal(np.asarray(got, np.float32).reshape(tensor.shape), rounded)
        assert got.dtype == jnp.bfloat16 and wanted[name].shape == tensor.shape


REFUSED = {
    "dora": (dict(use_dora=True), "use_dora is True, which is not supported"),
    "bias": (dict(bias="all"), "bias is 'all', which is not supported"),
    "saved": (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "type": (dict(peft_type="IA3"), "peft_type is 'IA3'; only 'LORA'"),
    "kasa": (dict(kasa_config={"beta": 1e-4}), "kasa_config is {'beta': 0.0001}, which is not"),
    "lora_ga": (dict(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga', which changes"),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights is 'olora', which changes"),
    "corda": (dict(init_lora_weights="corda"), "init_lora_weights is 'corda', which changes"),
    "targets": (dict(target_modules=7), "target_modules is 7; it must be a list of module names"),
    "target": (dict(target_modules="("), "target_modules is '\\(', which is not a valid regular"),
    "layers": (dict(layers_to_transform="1"), "layers_to_transform is '1'; it must be a layer or"),
    "pissa": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "alpha": (dict(lora_alpha="big"), "lora_alpha of model.layers.0.* is 'big'"),
    "zero": (dict(lora_alpha=0), "lora_alpha of model.layers.0.* is 0; it must be a positive"),
    "nothing": (dict(projections=()), "adapter_model.safetensors: contains no LoRA weights"),
    "rank": (dict(r=5),
             "r of model.layers.0.* is 5, but its factors in adapter_model.safetensors have "
             "rank 4"),
    "pattern": (dict(rank_pattern={"(": 2}), "rank_pattern has '\\('"),
    "huge count": (dict(rank_pattern={"q{99999999999}": 2}), "rank_pattern has 'q{9+}'"),
    "nested groups": (dict(rank_pattern={"(" * 499 + ")" * 499: 2}), r"rank_pattern has '\(+"),
    "long": (dict(alpha_pattern={"q_proj|" * 200: 2}), "alpha_pattern has 'q_proj.*too long"),
    "nested": (dict(alpha_pattern={"([a-z_.0-9]+)+!": 2}), "alpha_pattern has .*too long"),
    "repeated": (dict(alpha_pattern={".*" * 9 + "!": 2}), "alpha_pattern has .*too long"),
    "replicated": (dict(layer_replication=[[0, 2]]), "layer_replication is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused(base, tmp_path, case):
    settings, message = REFUSED[case]
    rank = settings.pop("r", 4) if case != "rank" else 4
    write(tmp_path / "a", rank=rank, **settings)
    with pytest.raises(jp.UserError, match=message):
        jp.load(base, adapter=tmp_path / "a")


def test_tensors_that_do_not_fit_are_all_listed(base, tmp_path):
    write(tmp_path / "a", rename=lambda n: n.replace("layers.2", "layers.7").replace(
        "layers.1.mlp.up_proj.lora_A", "layers.1.mlp.up_proj.lora_Q"))
    with pytest.raises(jp.UserError) as caught:
        jp.load(base, adapter=tmp_path / "a")
    text = str(caught.value)
    assert "the model has no weight model.layers.7.self_attn.q_proj.weight" in text
    assert "up_proj.lora_Q.weight: not a LoRA factor" in text and "only lora_B is present" in text
    write(tmp_path / "twice")
    path = tmp_path / "twice" / "adapter_model.safetensors"
    held = load_file(path)
    name = next(name for name in held if name.endswith("lora_A.weight"))
    save_file(held | {name.replace(".weight", ".default.weight"): held[name] + 1}, path)
    with pytest.raises(jp.UserError, match=r"weight: the weight has a second lora_A with another"):
        jp.load(base, adapter=tmp_path / "twice")
    other = tmp_path / "b"
    write(other)
    wide = dataclasses.replace(CONFIG, d_ff=64)
    with pytest.raises(jp.UserError, match=r"do not fit the weight's shape \[64, 32\]"):
        adapter.read_adapter(other, wide)


@pytest.mark.parametrize("make", ["missing", "model", "empty", "damaged"])
def test_other_folders_are_refused(base, tmp_path, make):
    folder = tmp_path / "a"
    if make == "model":
        folder = base
    elif make != "missing":
        write(folder)
        if make == "empty":
            (folder / "adapter_model.safetensors").unlink()
        else:
            (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(jp.UserError, match="no such folder|is not an adapter|adapter_model"):
        jp.load(base, adapter=folder)


@pytest.mark.parametrize("make", ["missing", "no config", "damaged", "dora", "other shapes"])
@pytest.mark.parametrize("options", [{}, {"merge": False}, {"dtype": "int8"}], ids=str)
def test_a_wrong_adapter_is_refused_before_the_base_is_read(base, tmp_path, make, options):
    folder = tmp_path / "a"
    if make != "missing":
        write(folder, use_dora=make == "dora",
              rename=lambda n: n.replace("layers.1", "layers.9") if "shapes" in make else n)
    if make == "no config":
        (folder / "adapter_config.json").unlink()
    if make == "damaged":
        (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    read = []
    with pytest.raises(jp.UserError, match=r"/a\b"):
        jp.load(base, adapter=folder, progress=lambda *sizes: read.append(sizes), **options)
    assert not read


SELECTED = {  # settings that select what `write` writes
    "list": {}, "regex": {"target_modules": r".*\.(self_attn|mlp)\..*_proj"},
    "all": {"target_modules": "all-linear"}, "null": {"target_modules": None},
    "whole names": {"target_modules": [
        f"model.layers.{i}.self_attn.q_proj" for i in range(CONFIG.n_layers)]},
}


@pytest.mark.parametrize("case", SELECTED)
def test_a_complete_adapter_is_read_without_a_word(tmp_path, case):
    """Warnings are errors in this test suite."""
    write(tmp_path / "a", **SELECTED[case])
    adapter.check_adapter(tmp_path / "a", CONFIG)


@pytest.mark.parametrize("settings", [
    {"layers_to_transform": [0, 2]}, {"exclude_modules": r"model\.layers\.1\..*"},
    {"target_modules": ["layers.0.mlp.up_proj"]}, {"layers_to_transform": 0}], ids=str)
def test_layers_that_the_settings_leave_out_are_not_missed(tmp_path, settings):
    write(tmp_path / "a", **settings)
    path = tmp_path / "a" / "adapter_model.safetensors"
    kept = {n: x for n, x in load_file(path).items() if ".layers.1." not in n}
    save_file(kept, path)
    adapter.check_adapter(tmp_path / "a", CONFIG)


@pytest.mark.parametrize("target", [list(ALL), "all-linear", r"model\.layers\.\d\.[a-z_]*\..*"])
def test_weights_that_the_settings_select_and_the_file_lacks_are_named_once(base, tmp_path, target):
    """As in peft, the base weights are used there."""
    write(tmp_path / "a", target_modules=target)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(path).items() if ".layers.1.self" not in n}, path)
    with pytest.warns(UserWarning, match="has no weights for model.layers.1.self_attn.k_proj, "
                                         "model.layers.1.self_attn.o_proj.* peft") as caught:
        model = jp.load(base, adapter=tmp_path / "a")
    assert len(caught) == 1
    plain = jp.load(base).params.layers
    for layer, same in ((0, False), (1, True)):
        assert np.array_equal(model.params.layers[layer].wq_nhd, plain[layer].wq_nhd) == same


def test_a_regular_expression_that_may_take_long_is_not_matched(tmp_path):
    write(tmp_path / "a", target_modules=".*" * 9 + "!")
    with pytest.warns(UserWarning, match="too long to match; whether adapter_model.safetensors"):
        adapter.check_adapter(tmp_path / "a", CONFIG)


def test_unknown_settings_are_named_once(base, tmp_path):
    write(tmp_path / "a", new_scale=0.5, off=False, none=None, peft_version="0.21",
          lora_dropout=0.1, inference_mode=True, eva_config={}, velora_config=None)
    with pytest.warns(UserWarning, match=r"ignored unknown settings \(new_scale=0.5\)") as caught:
        jp.load(base, adapter=tmp_path / "a")
    assert len(caught) == 1


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_beside_the_adapter_is_named_once(base, tmp_path, file):
    write(tmp_path / "a")
    text = "{{ messages }}"
    (tmp_path / "a" / file).write_text(
        text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    with pytest.warns(UserWarning, match=f"{file}: ignored the adapter's chat template") as caught:
        model = jp.load(base, adapter=tmp_path / "a")
    assert len(caught) == 1 and not model.template
    warn_unused_template(tmp_path / "a", types.SimpleNamespace(chat_template=text))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("projections", [list(ALL), ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_peft(base, tmp_path, projections, rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    made, plain = (AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False) for _ in range(2))
    torch.manual_seed(0)
    tuned = peft.get_peft_model(made, peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=projections, use_rslora=rslora,
        init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "a")
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        wanted = tuned(tokens).logits.numpy()
        without = plain(tokens).logits
    for merge in (True, False):
        model = jp.load(base, adapter=tmp_path / "a", merge=merge)
        got = forward(model.params, CONFIG, batch([[5, 6, 7, 8, 9]])).logits
        assert s.relative(got[0], wanted[0]).max() < 1e-4
    assert s.relative(without.numpy()[0], wanted[0]).max() > 0.01
