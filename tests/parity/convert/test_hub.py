"""A model of the Hub: one copy of its weights, of a known commit, and each failure its sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

import lechat_jax as lechat
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors import TensorFiles
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from lechat_jax.formats.configs.mistral import to_params
from lechat_jax.formats.hub import is_name
from lechat_jax.formats.names import Format, names, shapes
from parity.convert.command import main
from parity.convert.open_source import open_source

NAME, COMMIT = "mistralai/Mistral-7B-v0.1", "0123456789abcdef0123456789abcdef01234567"


def weights(config: MistralConfig, fmt: Format) -> dict[str, torch.Tensor]:
    sizes = shapes(config, fmt)
    return {key: torch.ones(sizes[name]) for name, key in names(config, fmt).items()}


@pytest.fixture
def repository(tiny: MistralConfig, tmp_path: Path) -> Path:
    """Files as a repository of Mistral's has them: everything twice, and more."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hugging_face(tiny, "float32", 64, 1, 2)))
    (folder / "params.json").write_text(json.dumps(to_params(tiny)))
    save_file(weights(tiny, "hf"), folder / "model.safetensors")
    save_file(weights(tiny, "mistral"), folder / "consolidated.safetensors")
    for name in ("pytorch_model.bin", "README.md", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the Hub: fills a cache as `snapshot_download` does, and lists its calls."""
    calls: list[Any] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision))
        cache = tmp_path / "cache" / "models--x"
        snapshot, blobs = cache / "snapshots" / COMMIT, cache / "blobs"
        for path in (snapshot, blobs):
            path.mkdir(parents=True, exist_ok=True)
        for path in repository.iterdir():
            wanted = any(fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not (snapshot / path.name).exists():
                (blobs / path.name).write_bytes(path.read_bytes())
                (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_only_one_copy_of_the_weights_is_downloaded(hub: list[Any]) -> None:
    source = open_source(NAME)
    assert source.format == "hf"
    assert sorted(path.name for path in source.path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "params.json",
        "tokenizer.json",
    ]


def test_a_model_of_the_hub_is_loaded_by_its_name(hub: list[Any], tiny: MistralConfig) -> None:
    model = lechat.load(NAME)
    assert model.config == tiny
    assert len(model.generate([1, 5], max_tokens=2).ids) == 2


def test_a_name_whose_first_half_is_a_folder_here_is_a_path(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"^runs/mistyped is not there; runs is a folder here"):
        lechat.load("runs/mistyped")
    assert not hub


def test_without_hugging_faces_files_mistrals_own_are_taken(
    hub: list[Any], repository: Path
) -> None:
    (repository / "model.safetensors").unlink()
    (repository / "config.json").unlink()
    source = open_source(NAME)
    assert source.format == "mistral"
    assert (source.path / "consolidated.safetensors").exists()


def test_the_commit_is_asked_for_throughout_and_written_down(
    hub: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "lechat"
    assert main([NAME, str(out), "--to", "lechat", "--revision", "main"]) == 0
    assert hub[0] == (NAME, "main")
    assert set(hub[1:]) == {(NAME, COMMIT)}
    again = tmp_path / "hf"
    assert main([str(out), str(again), "--to", "hf"]) == 0
    for folder in (out, again):
        metadata = TensorFiles.open(folder).metadata
        assert (metadata["source"], metadata["revision"]) == (NAME, COMMIT)


def failing(error: Exception) -> Callable[..., str]:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    return snapshot_download


RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=RESPONSE), "must be asked for: accept its terms at"),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "no such model on the Hugging"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "has no revision v9 on the Hugging"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (
            errors.IncompleteSnapshotError("x", snapshot_path="x"),
            "it is not whole in the Hub's cache",
        ),
        (errors.HFValidationError("x"), "no name of the Hub's"),
        (
            errors.HfHubHTTPError("server error\nlong", response=RESPONSE),
            "downloaded: server error",
        ),
        (OSError("No space left on device"), "cannot be downloaded: No space left"),
    ],
)
def test_each_failure_has_its_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(BadInput, match=message) as found:
        open_source(NAME, revision="v9")
    assert NAME in str(found.value)
    assert "\n" not in str(found.value)


def test_offline_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE is set; unset it to download"):
        open_source(NAME)


def test_the_command_says_so_with_exit_code_2(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "parity.convert", NAME, str(tmp_path / "out"), "--to", "hf"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"error: there is no folder {NAME}, it is not whole in the Hub's cache, and "
        "HF_HUB_OFFLINE is set; unset it to download\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"needs huggingface_hub: pip install 'lechat-jax\[hf\]'"):
        open_source(NAME)


def test_a_folder_is_never_looked_for_on_the_hub(
    hub: list[Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.parent.parent)
    assert open_source(f"{repository.parent.name}/repository").format == "hf"
    assert hub == []


@pytest.mark.parametrize("text", ["runs", "/runs/x", "../x", "a/b/c", "./a", "a b/c", "~/x", ""])
def test_what_is_no_name_of_the_hubs(text: str) -> None:
    assert not is_name(text)
