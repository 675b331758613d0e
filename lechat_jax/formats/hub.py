"""Downloads models from the Hugging Face Hub: one copy of the weights, at a recorded commit."""

import os
import re
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.files.buckets import local_copy, uri_of

SMALL = [  # read first, to see what the repository is
    "config.json",
    "params.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
]
# The same weights in several forms; the first form that is there is downloaded.
WEIGHTS = (
    (["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"], "model"),
    (["consolidated*.safetensors", "consolidated.safetensors.index.json"], "consolidated"),
    (["consolidated.*.pth"], ""),
)


def is_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the Hub, `org/name`.

    >>> is_name("mistralai/Mistral-7B-v0.1"), is_name("./runs/x"), is_name("runs/x/y")
    (True, False, False)
    """
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text))


def local_model(path: Path | str, revision: str | None = None) -> tuple[Path, dict[str, str]]:
    """The folder or file of a path, or of a model's name on the Hub, which is downloaded.

    A name whose first half is a folder here is taken for a path. What is in a bucket, gs:// or
    s3://, is fetched.

    Args:
        path: a path, a URI, or the name `org/name`.
        revision: of the model on the Hub: a branch, a tag or a commit.

    Returns:
        Where it is, and of a model of the Hub its name and commit as metadata.

    Raises:
        BadInput: as `download` says, or there is a revision for a path.
    """
    here = Path(path)
    if uri_of(path):
        return local_copy(path), {}
    if is_name(str(path)) and not here.exists():
        if not here.parent.is_dir():
            return download(str(path), revision)
        raise BadInput(
            f"{path} is not there; {here.parent} is a folder here, so that no model of that name "
            "is looked for on the Hugging Face Hub"
        )
    if revision is not None:
        raise BadInput(f"--revision is for models of the Hub, and {path} is a path")
    return here, {}


def download(name: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    """Downloads a model: its folder in the Hub's cache, and its name and commit as metadata.

    What is in the cache already is not downloaded again; with `HF_HUB_OFFLINE=1` in the
    environment nothing is.

    Raises:
        BadInput: `huggingface_hub` is missing; there is no such model or revision, it must be
            asked for, or nothing can be reached.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors  # which the package loads only when something is raised
    except ImportError:
        raise BadInput(
            f"there is no folder {name}, and to look for it on the Hugging Face Hub needs "
            "huggingface_hub: pip install 'lechat-jax[hf]'"
        ) from None
    folder = _snapshot(huggingface_hub, name, revision, SMALL)
    commit = folder.name
    for patterns, stem in WEIGHTS:
        _snapshot(huggingface_hub, name, commit, patterns)
        if stem and any(
            (folder / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json")
        ):
            break
    return folder, {"source": name, "revision": commit}


def _snapshot(module: Any, name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of the snapshot, with the files of these patterns in it."""
    errors = module.errors
    try:
        folder = module.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:  # before RepositoryNotFoundError, of which it is one
        raise BadInput(
            f"{name} must be asked for: accept its terms at https://huggingface.co/{name}, "
            "then log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"there is no folder {name}, and no such model on the Hugging Face Hub; if it is "
            "private, log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(f"{name} has no revision {revision} on the Hugging Face Hub") from None
    except errors.HFValidationError as error:
        raise BadInput(f"{name} is no folder and no name of the Hub's: {error}") from None
    except errors.LocalEntryNotFoundError:
        why = (
            "HF_HUB_OFFLINE is set; unset it to download"
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "the Hugging Face Hub cannot be reached"
        )
        raise BadInput(
            f"there is no folder {name}, it is not whole in the Hub's cache, and {why}"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{name} cannot be downloaded: {reason}") from None
    return Path(folder)
