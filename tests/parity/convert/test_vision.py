"""Of a model that can also see, the text part is read, and what is left out is said."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lechat_jax.checkpoint.weights import load_weights
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from parity.architectures import ARCHITECTURES
from parity.check.oracles.lechat_jax import JaxOracle
from parity.convert.command import main as convert
from parity.convert.open_source import open_source

VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
KINDS = {"ministral-3": ("ministral-3", True), "devstral-2": ("devstral-2", False)}


def seeing(kind: str, tied: bool) -> Any:
    """Transformers' own model with a text part of that kind and a small eye."""
    config = ARCHITECTURES[kind]
    words = transformers.Mistral3Config(
        text_config=to_hugging_face(config, "float32", None, 1, 2),
        vision_config=VISION,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(words).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(("kind", "tied"), KINDS.values(), ids=KINDS)
def test_the_text_part_of_transformers_own_files_is_that_model(
    kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = seeing(kind, tied)
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert any(key.startswith("language_model.model.") for key in keys)
    assert convert([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "lechat"]) == 0
    said = capsys.readouterr().out
    [note] = re.findall("only the text part is read; tensors left out: (.*)", said)
    assert re.fullmatch(r"\d of multi_modal_projector, \d+ of vision_tower", note)
    config, weights = load_weights(tmp_path / "ours")
    assert config == ARCHITECTURES[kind]
    ids = np.random.default_rng(0).integers(20, config.vocab_size, size=(2, 33))
    ours = JaxOracle(config, {n: np.asarray(w) for n, w in weights.items()}, "float32")
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert expected.std() > 0.3
    found = ours.forward(ids)["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


def renamed(folder: Path, into: Path, names: dict[str, str], **config: Any) -> Path:
    """The folder with its keys' beginnings changed, and with other fields in its config."""
    into.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {
            new + key.removeprefix(old) if key.startswith(old) else key: tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (into / "config.json").write_text(json.dumps(fields))
    return into


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing") / "saved"
    seeing("devstral-2", tied=False).save_pretrained(folder)
    return folder


LIVE = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@pytest.mark.parametrize("tie", [True, None, False])
def test_names_of_a_live_model_are_read_and_a_head_that_is_there_is_believed(
    tie: bool | None, saved: Path, tmp_path: Path
) -> None:
    """As transformers does, whose class would tie a model that does not say that it is not."""
    fields = json.loads((saved / "config.json").read_text())
    text = {**fields["text_config"], "tie_word_embeddings": tie}
    live = renamed(saved, tmp_path / "live", LIVE, tie_word_embeddings=tie, text_config=text)
    first, second = open_source(saved), open_source(live)
    assert first.config == second.config == ARCHITECTURES["devstral-2"]
    assert first.store.notes == second.store.notes
    assert " of vision_tower" in first.store.notes[0]
    for name in first.names:
        np.testing.assert_array_equal(first.read(name), second.read(name))


def test_a_part_that_nobody_knows_is_not_left_out(saved: Path, tmp_path: Path) -> None:
    odd = renamed(saved, tmp_path / "odd", {"vision_tower.": "hearing."})
    with pytest.raises(BadInput, match=r"has hearing\..*which its config does not know"):
        open_source(odd)


def test_a_tensor_that_is_there_under_both_names_is_refused(saved: Path, tmp_path: Path) -> None:
    norm = {"vision_tower.ln_pre.weight": "model.norm.weight"}
    with pytest.raises(BadInput, match=r"has model\.norm\.weight twice"):
        open_source(renamed(saved, tmp_path / "twice", norm))


def test_mistrals_own_files_have_an_eye_of_other_names(saved: Path, tmp_path: Path) -> None:
    """Also: to Mistral's format and back, with an eye put beside it, nothing has changed."""
    own = tmp_path / "own"
    assert convert([str(saved), str(own), "--to", "mistral"]) == 0
    path = own / "consolidated.safetensors"
    eye = {
        f"{name}.weight": torch.ones(2)
        for name in (
            "vision_encoder.ln_pre",
            "vision_language_adapter.w_in",
            "patch_merger.merging_layer",
            "pre_mm_projector_norm",
        )
    }
    save_file({**load_file(path), **eye}, path)
    with pytest.raises(BadInput, match=r"patch_merger.*which its config does not know"):
        open_source(own)
    fields = json.loads((own / "params.json").read_text())
    (own / "params.json").write_text(json.dumps({**fields, "vision_encoder": {"dim": 2}}))
    found, expected = open_source(own), open_source(saved)
    assert found.config == expected.config
    assert found.store.notes == (
        "only the text part is read; tensors left out: 1 of patch_merger, "
        "1 of pre_mm_projector_norm, 1 of vision_encoder, 1 of vision_language_adapter",
    )
    for name in expected.names:
        np.testing.assert_array_equal(found.read(name), expected.read(name))
