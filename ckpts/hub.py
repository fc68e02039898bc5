"""Download repositories from the Hugging Face Hub, or find them in the local cache."""

from __future__ import annotations

import pathlib

from jaxpersona.errors import UserError
from jaxpersona.extras import require

_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
# files that are not downloaded: duplicate weights, adapters, and exports for other runtimes
_NOT_FETCHED = ("consolidated*.safetensors", "adapter_model*.safetensors", "*/*.safetensors",
                "original/*", "onnx/*")


def download(name: str, revision: str | None) -> pathlib.Path:
    """Return the local folder of a Hugging Face Hub repository; download its files if needed.

    Only files that match `_PATTERNS` and not `_NOT_FETCHED` are downloaded.

    Args:
      name: the repository, "owner/name".
      revision: a branch, tag or commit; None uses the default branch.

    Raises:
      UserError: the repository is gated, missing or unreachable, the revision does not exist, the
        name is invalid, the download fails, or huggingface_hub is not installed; the message states
        the reason.
    """
    require("huggingface_hub", f"{name}: downloads from the Hugging Face Hub need huggingface_hub")
    from huggingface_hub import constants, errors, snapshot_download

    at = f"{name}@{revision}" if revision else name
    try:
        return pathlib.Path(snapshot_download(name, revision=revision,
                                              allow_patterns=list(_PATTERNS),
                                              ignore_patterns=list(_NOT_FETCHED)))
    except errors.GatedRepoError:
        raise UserError(f"{at}: the repository is gated; accept its terms on huggingface.co and "
                        "log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{at}: unknown revision; give a branch, tag or commit of the "
                        "repository") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{at}: no such folder, and no such repository on the Hugging Face Hub "
                        "(private repositories need `hf auth login`)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
        raise UserError(f"{at}: no such folder, not in the local cache, and the Hugging Face Hub "
                        f"is unreachable ({why}); download the model first, or go online") from None
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.EntryNotFoundError,
            OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{at}: no such folder, and the download failed ({reason})") from None
