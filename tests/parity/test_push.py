"""What is published on the Hub: a conversion and its card, in one commit, or nothing."""

import base64
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import transformers
import yaml

import lechat_jax as lechat
from lechat_jax.checkpoint.weights import load_weights, save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import weights_of
from lechat_jax.train.command import main as train
from parity.push import main
from tests.support import tokenizers
from tests.support.images import SEES
from tests.support.models import TINY_LATENT, random_model

NAME = "somebody/a-model"
SHORT = "--batch 2 --block 16 --max-tokens 4 --steps 2 --eval-tokens 64 --dim 32 --n-layers 2"
SHORT += " --n-heads 4 --n-kv-heads 2 --head-dim 8 --hidden-dim 48 --sliding-window 8"


class Hub:
    """Stands for the Hub: makes repositories and takes commits of whole files.

    Attributes:
        files: what was committed, by name; None until something is.
        address: of the server.
        asked: the path of each request.
        refuses: the status that a commit is answered with, if it is.
    """

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, bytes] | None = None
        self.asked: list[str] = []
        self.made: dict[str, Any] = {}
        self.refuses: int | None = None

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.asked.append(path)
        if path.endswith("/api/repos/create"):
            self.made = json.loads(body)
            return 200, {"url": f"{self.address}/{NAME}"}
        if path.endswith("/api/validate-yaml"):
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {"errors": [], "warnings": []}
        if path.endswith(f"/api/models/{NAME}/preupload/main"):
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": one["path"], **how} for one in files]}
        if path.endswith(f"/api/models/{NAME}/commit/main"):
            if self.refuses:
                return self.refuses, {"error": "you may not write here"}
            lines = [json.loads(line) for line in body.splitlines()]
            assert lines[0]["key"] == "header"
            self.files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines[1:]
            }
            return 200, {"commitUrl": f"{self.address}/{NAME}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": f"there is no {path}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    own = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = own.answer(self.path.partition("?")[0], body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", own.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield own
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    text = folder / "squares.txt"
    text.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(300)))
    out = folder / "mine"
    assert train(["--data", str(text), "--out", str(out), *SHORT.split()]) == 0
    return out


def front_matter(files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    _, fields, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(fields), text


def test_a_run_is_published_with_how_it_was_trained_and_measured(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), NAME, "--license", "apache-2.0", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/{NAME}/commit/1"
    assert hub.made["visibility"] == "private"
    assert hub.files is not None
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    for name, array in lechat.load(run).weights.items():
        np.testing.assert_array_equal(load_weights(folder)[1][name], array)
    said = [lechat.load(path).generate("The square", max_tokens=8).ids for path in (run, folder)]
    assert said[0] == said[1]
    fields, text = front_matter(hub.files)
    assert fields["license"] == "apache-2.0"
    assert fields["library_name"] == "transformers"
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(scores) if "val/bpb" in row)
    assert f"{last['val/bpb']:.4f} bits per byte" in text
    assert "| steps | 2 |" in text
    assert "| text | squares.txt |" in text
    assert str(run.parent) not in text  # nobody is told where it lay


def test_a_model_is_published_as_a_file_for_llama_cpp(
    hub: Hub, tiny: MistralConfig, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    taught = tokenizers.taught(tmp_path)
    config = MistralConfig.from_dict(tiny.to_dict() | {"vocab_size": 300, "sliding_window": None})
    save_weights(tmp_path / "model", config, weights_of(random_model(config)), taught)
    assert main([str(tmp_path / "model"), NAME, "--to", "gguf"]) == 0
    assert hub.files is not None
    assert sorted(hub.files) == ["README.md", "a-model.gguf"]
    assert hub.files["a-model.gguf"][:4] == b"GGUF"
    assert f"llama-cli -hf {NAME}" in front_matter(hub.files)[1]


def test_a_model_that_sees_is_published_with_its_tower_and_for_llama_cpp_without(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    config = dataclasses.replace(SEES, vocab_size=tokenizers.tokenizer("v7m1").vocab_size)
    weights = weights_of(random_model(config))
    save_weights(tmp_path / "model", config, weights, tokenizers.shipped("v7m1"))
    assert main([str(tmp_path / "model"), NAME]) == 0
    assert hub.files is not None
    fields, text = front_matter(hub.files)
    assert fields["pipeline_tag"] == "image-text-to-text"
    assert 'chat().say("What is it?", ["image.png"])' in text
    capsys.readouterr()
    assert main([str(tmp_path / "model"), NAME, "--to", "gguf"]) == 0
    assert "tensors of the vision tower left out" in capsys.readouterr().out
    assert front_matter(hub.files)[0]["pipeline_tag"] == "text-generation"
    (tmp_path / "a.gguf").write_bytes(hub.files["a-model.gguf"])
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(names) == len(config.text.weights)
    assert all(name.startswith(("blk.", "token_embd", "output")) for name in names)


def test_a_card_of_latent_attention_names_the_class_that_loads_it(hub: Hub, tmp_path: Path) -> None:
    """Transformers' `pipeline` and its auto classes don't know it."""
    config = dataclasses.replace(TINY_LATENT, norm_eps=1e-6, vocab_size=32000)
    model = tmp_path / "model"
    save_weights(model, config, weights_of(random_model(config)), tokenizers.shipped("v1"))
    kept = tmp_path / "kept"
    assert main([str(model), NAME, "--dry-run", "--keep", str(kept)]) == 0
    text = (kept / "README.md").read_text()
    (loading,) = re.findall(r"from transformers import (\w+)", text)
    found = getattr(transformers, loading).from_pretrained(kept)
    assert sum(weight.numel() for weight in found.parameters()) == config.n_params


def test_what_is_refused_leaves_nothing(hub: Hub, run: Path, tmp_path: Path) -> None:
    hub.refuses = 403
    with pytest.raises(BadInput, match=r"a-model cannot be published: .*hf auth login"):
        main([str(run), NAME])
    assert hub.files is None
    for argv, message in (
        ([str(run), "no-slash"], "is no name of a model on the Hub"),
        ([str(run), NAME, "--dry-run"], "name it with --keep"),
        ([str(run), NAME, "--keep", str(tmp_path)], "exists; name another folder"),
        ([str(tmp_path / "nowhere"), NAME], "nowhere is not there"),
    ):
        before = len(hub.asked)
        with pytest.raises(BadInput, match=message):
            main(argv)
        assert len(hub.asked) == before


def test_a_dry_run_leaves_the_folder_and_asks_nobody(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert main([str(run), NAME, "--keep", str(tmp_path / "kept"), "--dry-run"]) == 0
    assert not hub.asked
    assert {"README.md", "config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "kept").iterdir()
    }
