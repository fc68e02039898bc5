"""Read the tokenizer of a model folder with transformers, without remote code."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import read_json, require_files

_FILES = (".json", ".jinja", ".model", ".txt")  # suffixes of files that a tokenizer may consist of
_T = TypeVar("_T")
# classes of transformers that read tokenizer.json as it is
_READ_WHOLE = ("TokenizersBackend", "PreTrainedTokenizerFast")
_PROBE = "Hello,  world!\n\n\tI'll PAY 12345 (3.14)... e\u0301 日本 x_y <tag>"
_STDERR = threading.Lock()  # guards file descriptor 2


def read_tokenizer(folder: pathlib.Path) -> Any:
    """Load a folder's tokenizer with transformers.

    Remote code from the folder is never run, and transformers does not prompt the user to allow it.

    Returns:
      The tokenizer, or None if the folder contains neither tokenizer.json nor tokenizer.model.

    Raises:
      UserError: the tokenizer files are malformed, the tokenizer needs remote code, or transformers
        is not installed.
    """
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    for part in (folder, folder / "additional_chat_templates"):
        if part.is_dir():
            require_files(part, _FILES)
    transformers = require("transformers", f"{folder}: tokenizers need transformers")

    def read() -> Any:
        # with None instead of False, transformers would prompt the user to allow remote code
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **_named_class(folder))
        encode_once(tokenizer)
        _warn_rebuilt(folder / "tokenizer.json", tokenizer)
        return tokenizer

    tokenizer = checked(folder, read)
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else (template or "",)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{folder}: chat_template in tokenizer_config.json is {template!r:.60}; "
                        "it must be a string or a JSON object of strings")
    return tokenizer


def _warn_rebuilt(path: pathlib.Path, tokenizer: Any) -> None:
    """Warn if the tokenizer that transformers built differs from its tokenizer.json.

    Classes with their own `__init__`, such as GPT2Tokenizer, read the vocabulary, the merges and
    the post-processor from the file, but ignore its normalizer and its pre-tokenizer.
    """
    kind = type(tokenizer)
    if kind.__name__ in _READ_WHOLE or "__init__" not in vars(kind) or not path.is_file():
        return
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(path))
    stored.no_truncation()
    stored.no_padding()
    text = _PROBE + "".join(f"{token}a 1" for token in tokenizer.all_special_tokens[:2])
    if tokenizer.encode(text, add_special_tokens=False) != stored.encode(
            text, add_special_tokens=False).ids:
        warnings.warn(f"{path}: {kind.__name__} of transformers splits texts differently from this "
                      "file; it is used, as in transformers. If the model was trained with the "
                      "file, set tokenizer_class in tokenizer_config.json to "
                      "PreTrainedTokenizerFast", stacklevel=2)


def warn_unused_template(folder: pathlib.Path, tokenizer: Any) -> None:
    """Warn if an adapter's folder has a chat template that differs from the base model's."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        require_files(folder, (".jinja",))
        own: Any = path.read_text(encoding="utf-8", errors="replace")
    else:
        path = folder / "tokenizer_config.json"
        raw = read_json(path) if path.is_file() else None
        own = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(own, list) and all(isinstance(x, dict) for x in own):  # several named templates
        own = {x.get("name"): x.get("template") for x in own}
    if own and own != getattr(tokenizer, "chat_template", None):
        warnings.warn(f"{path}: ignored the adapter's chat template, which differs from the base "
                      "model's; to use it, save it in the base model's folder, or save the merged "
                      "model with the adapter's tokenizer", stacklevel=2)


def _named_class(folder: pathlib.Path) -> dict[str, Any]:
    """Return {"config": …} for AutoTokenizer if the folder names a model type and tokenizer class.

    Otherwise, or if a file refers to remote code (`auto_map`), return {}. AutoTokenizer needs
    `model_type` and `tokenizer_class` from the model's configuration. Without a `config` argument,
    it imports the configuration class to read them. If PyTorch is installed, this also imports
    PyTorch's distributed tensors, which takes five times as long as reading the tokenizer.
    """
    from transformers import PretrainedConfig

    path = folder / "tokenizer_config.json"
    own = read_json(path) if path.exists() else None
    raw = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if not isinstance(own, dict) or not isinstance(raw, dict) or "auto_map" in own or (
            "auto_map" in raw):
        return {}
    kind, name = own.get("tokenizer_class"), raw.get("model_type")
    if not isinstance(kind, str) or not isinstance(name, str) or not name:
        return {}
    known = {"model_type": name, "tokenizer_class": raw.get("tokenizer_class")}
    return {"config": PretrainedConfig.from_dict(known, name_or_path=str(folder))}


def encode_once(tokenizer: Any) -> None:
    """Encode a text, so that an unsupported regular expression in the tokenizer raises an error."""
    with _without_stderr():
        tokenizer("Hello, world! 1 + 1", add_special_tokens=False)


def checked(path: pathlib.Path, make: Callable[[], _T]) -> _T:
    """Call `make`, which creates a tokenizer; convert any error to a UserError with the path."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except BaseException as error:  # any exception of transformers, or a Rust panic in tokenizers
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise UserError(f"{path}: the tokenizer needs remote code (auto_map in "
                            "tokenizer_config.json), which is never run; save the tokenizer as "
                            "tokenizer.json and remove auto_map") from error
        raise UserError(f"{path}: the tokenizer cannot be read ({reason})") from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard the stderr output of native code, such as the backtrace of a panic.

    A lock prevents concurrent use. A second concurrent call would save the file descriptor that is
    already redirected, and finally restore the redirection instead of stderr.
    """
    with _STDERR:
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        try:
            with open(os.devnull, "wb") as sink:
                os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
