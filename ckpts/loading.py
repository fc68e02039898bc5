"""Load models: folders, GGUF files, Hugging Face Hub repositories, "mini" and random models.

Optional packages are imported only for the sources that need them, such as gguf for GGUF files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import difflib
import importlib.resources
import os
import pathlib
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import gguf_config, gguf_model, gguf_tokenizer, hf, orbax
from jaxpersona.ckpts.adapter import attached, check_adapter, check_folder, merged, read_adapter
from jaxpersona.ckpts.hub import download
from jaxpersona.ckpts.quantize import Form, load_int8, parse_form
from jaxpersona.ckpts.source import Progress, load_params
from jaxpersona.ckpts.tokenizer import (
    checked,
    encode_once,
    read_tokenizer,
    warn_unused_template,
)

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.distributed import sharding
from jaxpersona.distributed.context import own_context
from jaxpersona.engine.compile_cache import use_compile_cache
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.families import FAMILIES
from jaxpersona.models.int8 import scheme
from jaxpersona.models.model import Model
from jaxpersona.models.params import (
    Params,
    begin_fingerprint,
    fingerprint,
    init_params,
    layout,
)
from jaxpersona.models.prepared import in_int8
from jaxpersona.models.presets import PRESETS, preset
from jaxpersona.progress import megabytes, shows

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from numpy.typing import DTypeLike

# generation_config.json settings that transformers supports and this package ignores, each with the
# value that has no effect; a null never has an effect
_UNFOLLOWED = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_length": 0, "min_new_tokens": 0, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "length_penalty": 1.0, "guidance_scale": 1.0, "penalty_alpha": 0.0,
    "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
    "force_words_ids": [], "constraints": [], "sequence_bias": {}, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "forced_decoder_ids": [], "stop_strings": [],
    "exponential_decay_length_penalty": None, "watermarking_config": None, "dola_layers": None,
    "remove_invalid_values": False, "renormalize_logits": False, "token_healing": False,
}
# settings that matter only if do_sample is true, each with the values that cause no warning: values
# without effect and the default of transformers
_SAMPLED = {"top_k": (0, 50), "min_p": (0, 0.0), "top_h": ()}
_MINI_VOCABULARY = 1024
_T = TypeVar("_T")


@checked_call
@shows(megabytes)
@own_context()
def load(source: str | os.PathLike[str], *, mesh: Mesh | None = None,
         dtype: DTypeLike | None = None,
         progress: Progress | bool | None = None, revision: str | None = None,
         adapter: str | os.PathLike[str] | None = None, merge: bool = True,
         activations: DTypeLike | None = None,
         tables: Literal["int8", "float"] | None = None) -> Model:
    """Load a model and enable the on-disk compilation cache (`compile_cache`).

    Args:
      source: a path or a name. A path is a folder in the Hugging Face layout, a folder that
        `ckpts.orbax.save` wrote, or a GGUF file (of a split model, the first part). GGUF files are
        dequantized; their architecture must be llama (which includes Mistral), qwen2, qwen3, gemma2
        or gemma3. A name is "mini" (the model included in this package), "random:<preset>" (random
        weights in the shapes of a preset), or a Hugging Face Hub repository, "owner/name" or
        "owner/name@revision".
      mesh: the mesh over which to shard the parameters. `Model.mesh` is this mesh adapted to the
        model (`sharding.fit`) and may have an additional axis. Under `jax.set_mesh`, functions that
        take a `Model` accept either mesh, but functions that take parameters need `Model.mesh`.
      dtype: "float32", "bfloat16", "float16" or "int8". Default: float32 if the parameters are on a
        CPU (according to `mesh` or `jax.default_device`), else bfloat16. Float16 raises an error
        for Gemma 2 and 3, because their activations exceed its range. Int8 quantizes the matrices
        with one scale per output channel (`int8.Int8`), but not the norms and biases. The int8
        model has the same fingerprint as the float model. On a CPU without a mesh, tensors of GGUF
        type Q8_0 keep their int8 values and block scales, unless a merged adapter changes them.
      progress: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called with (bytes read so far, total bytes) instead.
      revision: a branch, tag or commit of the Hub repository; only a commit is immutable.
      adapter: the folder of a LoRA adapter for this model, in the format of PEFT.
      merge: whether to add the adapter to the weights (with dtype="int8", before they are
        quantized). False keeps the adapter separate (`weight.LowRank`), so that the base weights
        are not rounded again.
      activations: with dtype="int8", the dtype of the activations. Default: float32 on a CPU, else
        bfloat16.
      tables: with dtype="int8", the form of the embedding and the output head: "int8" (default), or
        "float" for the dtype of the activations.

    Raises:
      UserError: an argument is invalid, or the model or adapter is missing, invalid or unsupported;
        the message states the reason.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.load("mini")
      Model('mini', qwen3, 8 layers × 128, float32)
    """
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"mesh is {shown(mesh, 60)}; give the result of jaxpersona.make_mesh")
    if not isinstance(adapter, (str, os.PathLike, type(None))):
        raise UserError(f"adapter is {shown(adapter, 60)}; give a folder")
    form = parse_form(dtype, activations, tables, _default_dtype(mesh))
    folder = None if adapter is None else pathlib.Path(os.path.expanduser(os.fspath(adapter)))
    if folder is not None:
        check_folder(folder)  # before the base model is downloaded
    model = _load(source, mesh, dataclasses.replace(form, adapter=folder,
                                                    merge=folder if merge else None),
                  progress if callable(progress) else None, revision)
    if folder is None:
        return model
    warn_unused_template(folder, model.tokenizer)
    params = model.params
    if not (merge and form.int8):  # for int8, `_load` merges the adapter before quantization
        updates = read_adapter(folder, model.config)
        params = (merged if merge else attached)(params, model.config, updates)
    return dataclasses.replace(model, params=params, name=f"{model.name}+{folder.name}")


def _load(source: str | os.PathLike[str], mesh: Mesh | None, kind: Form,
          progress: Progress | None, revision: str | None) -> Model:
    """Load a model (see `load`); merge the adapter only if the weights are quantized on loading."""
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"source is {shown(source, 60)}; give a path or a model's name")
    use_compile_cache()
    name = os.fspath(source)
    path = pathlib.Path(os.path.expanduser(name))
    local = (name == "mini" or name.startswith(("random:", ".", "/", "~")) or _there(path)
             or name.endswith(gguf_model.SUFFIX))
    if local or isinstance(source, pathlib.PurePath):
        if revision is not None:
            raise UserError(f"revision is {revision!r}, but {name} is not a Hub repository; "
                            "omit revision")
        if name.startswith("random:"):
            return _random(name, kind, mesh)
        if name == "mini":
            with importlib.resources.as_file(_mini()) as folder:
                return _folder(folder, name, kind, mesh, progress)
        if path.suffix == gguf_model.SUFFIX and not path.is_dir():
            return _gguf(path, name, kind, mesh, progress)
        return _folder(path, name, kind, mesh, progress)
    repository, _, pinned = name.partition("@")
    if not _is_repository(repository) or name.endswith("@"):
        near = difflib.get_close_matches(name.lower(), ["mini", *PRESETS], 1, 0.7)
        meant = f" (did you mean {near[0]}?)" if near else ""
        if near and near[0] in PRESETS:
            meant = (f" (random:{near[0]} has random weights; for a released model, give its "
                     "owner/name on the Hub)")
        raise UserError(f"{name}: no such folder{meant}; a model is a folder, a .gguf file, "
                        "owner/name on the Hugging Face Hub (Llama, Qwen 2.5 and 3, Gemma 2 and 3, "
                        "Mistral), mini or random:<preset>")
    if pinned and revision not in (None, pinned):
        raise UserError(f"two revisions are given ({name} and {revision!r}); give only one")
    return _folder(download(repository, pinned or revision), name, kind, mesh, progress)


def _there(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a later read of the path raises a more precise error
        return True


def _mini() -> Traversable:
    return importlib.resources.files("jaxpersona.ckpts") / "mini"


def _is_repository(name: str) -> bool:
    """Return whether a name has the form of a Hub repository, owner/name."""
    parts = name.split("/")
    plain = all(part and part.strip(".-_") and " " not in part for part in parts)
    return len(parts) == 2 and plain


def _default_dtype(mesh: Mesh | None) -> np.dtype:
    where = sharding.default_platform() if mesh is None else mesh.devices.flat[0].platform
    return np.dtype(np.float32 if where == "cpu" else jnp.bfloat16)


def _check_form(config: ModelConfig, form: Form, name: str) -> None:
    """Check the dtypes and the adapter against the configuration, before the weights are read.

    Raises:
      UserError: the activations would be float16 in a model family whose activations exceed the
        range of float16, or the adapter is invalid or does not fit the model (`check_adapter`).
    """
    if form.dtype == np.float16 and not FAMILIES[config.family].float16:
        argument = "activations" if form.int8 else "dtype"
        raise UserError(f"{argument} is 'float16', but the activations of {config.family} models, "
                        f"such as {name}, exceed 65504, the largest float16 number; use 'bfloat16' "
                        "or 'float32'")
    if form.adapter is not None:
        check_adapter(form.adapter, config)


def _random(name: str, form: Form, mesh: Mesh | None) -> Model:
    config = preset(name.removeprefix("random:"))
    _check_form(config, form, name)

    def draw() -> Params:
        return init_params(config, jax.random.key(0), form.dtype)

    if mesh is None:
        params = draw()
    else:  # sharded during initialization, because one device may be too small for all parameters
        mesh = sharding.fit(mesh, config)
        places = jax.tree.map(lambda s: sharding.weight_sharding(s.axes, s.shape, mesh),
                              layout(config))
        params = jax.jit(draw, out_shardings=places)()
    params = _quantized(params, config, form)
    tokenizer, stop_ids = None, ()
    if config.vocab_size >= _MINI_VOCABULARY and (_mini() / "tokenizer.json").is_file():
        with importlib.resources.as_file(_mini()) as folder:
            tokenizer = read_tokenizer(folder)
            stop_ids = _stop_ids(folder, {}, tokenizer)
    return _model(config, params, tokenizer, mesh, name, stop_ids, fingerprint(config, params))


def _quantized(params: Params, config: ModelConfig, form: Form) -> Params:
    """Return the parameters, quantized to int8 if `form.int8` is true.

    In that case, the adapter in `form.merge`, if any, is first added to the weights.
    """
    if not form.int8:
        return params
    if form.merge is not None:
        params = merged(params, config, read_adapter(form.merge, config))
    return in_int8(params, tables=form.tables is not False)


def _folder(folder: pathlib.Path, name: str, form: Form, mesh: Mesh | None,
            progress: Progress | None) -> Model:
    config, raw = hf.read_config(folder)
    _check_form(config, form, name)
    mesh = None if mesh is None else sharding.fit(mesh, config)
    if orbax.holds_checkpoint(folder):
        if also := [name for name in (hf.SINGLE, hf.INDEX) if (folder / name).exists()]:
            raise UserError(f"{folder}: contains both an Orbax checkpoint ({orbax.NAME}) and "
                            f"{also[0]}; remove the outdated one")
        params, _ = orbax.load(folder, dtype=form.dtype, mesh=mesh)
        if not (stored := scheme(params)):
            params = _quantized(params, config, form)
        elif form.given and not form.int8 or form.tables == ("float tables" in stored) or (
                form.merge is not None):
            raise UserError(f"{folder}: the weights are stored as {stored}, which can be neither "
                            "converted nor merged with an adapter; omit dtype and tables, use "
                            "merge=False, or load the float model")
        finish = begin_fingerprint(config, params)  # computed while the tokenizer is read
        tokenizer = read_tokenizer(folder)
    else:
        with _beside(lambda: read_tokenizer(folder)) as tokenizer_of:
            if form.int8:
                source = hf.open_source(folder, config)
                params = load_int8(source, config, form, mesh=mesh, progress=progress)
            else:
                params = hf.load(folder, config, dtype=form.dtype, mesh=mesh, progress=progress)
            finish = begin_fingerprint(config, params)
            tokenizer = tokenizer_of()
    return _model(config, params, tokenizer, mesh, name, _stop_ids(folder, raw, tokenizer),
                  finish())


@contextlib.contextmanager
def _beside(make: Callable[[], _T]) -> Iterator[Callable[[], _T]]:
    """Run `make` in a thread; yield a function that waits for its result and returns it.

    `make` must not use JAX, whose settings are thread-local. The caller therefore loads the weights
    in the body of the `with` block. On exit, the context manager waits for `make`.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(make).result


def _gguf(path: pathlib.Path, name: str, form: Form, mesh: Mesh | None,
          progress: Progress | None) -> Model:
    checkpoint = gguf_model.open_checkpoint(path)
    config, source = checkpoint.config, checkpoint.source
    _check_form(config, form, name)
    gguf_config.warn_sampling(checkpoint.fields, name)
    mesh = None if mesh is None else sharding.fit(mesh, config)

    def build() -> tuple[Any, tuple[int, ...]]:
        tokenizer = gguf_tokenizer.build(checkpoint.fields)
        if tokenizer is not None:
            encode_once(tokenizer)
        return tokenizer, gguf_tokenizer.stop_ids(checkpoint.fields)

    with _beside(lambda: checked(path, build)) as tokenizer_of:
        if form.int8:
            params = load_int8(source, config, form, mesh=mesh, progress=progress,
                               blocks=source.blocks)
        else:
            params = load_params(source, config, dtype=form.dtype, mesh=mesh, progress=progress)
        finish = begin_fingerprint(config, params)
        tokenizer, stop_ids = tokenizer_of()
    return _model(config, params, tokenizer, mesh, name, stop_ids, finish())


def _model(config: ModelConfig, params: Params, tokenizer: Any, mesh: Mesh | None, name: str,
           stop_ids: tuple[int, ...], mark: str) -> Model:
    template = bool(getattr(tokenizer, "chat_template", None))
    return Model(config, params, tokenizer, mesh, name, mark, stop_ids, template)


def _stop_ids(folder: pathlib.Path, raw: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Collect the stop token ids from generation_config.json, config.json and the tokenizer.

    Warn about settings of generation_config.json that `generate` does not support.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    if not isinstance(generation, dict):
        raise UserError(f"{path}: contains a {type(generation).__name__}, not a JSON object")
    _warn_unfollowed(path, generation)
    stop_ids: list[int] = []
    for place, value in (
        (path.name, generation.get("eos_token_id")),
        ("config.json", raw.get("eos_token_id")),
        ("the tokenizer", getattr(tokenizer, "eos_token_id", None)),
    ):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise UserError(f"{folder}: eos_token_id of {place} is {reprlib.repr(value)}; it must "
                            "be a token id or a list of token ids")
        stop_ids += ids
    return tuple(dict.fromkeys(stop_ids))


def _warn_unfollowed(path: pathlib.Path, generation: Mapping[str, Any]) -> None:
    """Warn about generation_config.json settings that `generate` does not support."""
    unfollowed = [key for key, nothing in _UNFOLLOWED.items()
                  if generation.get(key) is not None and generation[key] != nothing]
    if generation.get("do_sample") is True:
        unfollowed += [key for key, nothing in _SAMPLED.items()
                       if generation.get(key) is not None and generation[key] not in nothing]
    if unfollowed:
        settings = ", ".join(f"{key}={reprlib.repr(generation[key])}" for key in unfollowed)
        warnings.warn(f"{path}: ignored {settings}, which generate does not support; "
                      "replies may differ from those of transformers", stacklevel=2)
