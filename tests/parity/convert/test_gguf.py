"""GGUF: llama.cpp computes the same function from it, and it comes back as it was."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn
from lechat_jax.config.layout import EMBEDDING
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import write_manifest
from lechat_jax.formats import layouts
from lechat_jax.formats.gguf import architecture
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.jinja_template import chat_template
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.convert import command, write_gguf
from parity.convert.open_source import open_source
from tests.parity.checkpoints import random_weights, write_torch
from tests.support import npm, tokenizers
from tests.support.models import logits_of, random_model

LLAMA = Path(__file__).with_name("llama.mjs")
W = 8
PLAIN = MistralConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=300,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=None,
)
YARN = Yarn(8.0, original_max_position_embeddings=16, beta=4.0, alpha=1.0, apply_scale=False)


def like(**changes: Any) -> MistralConfig:
    return dataclasses.replace(PLAIN, **changes)


MIXTURE: dict[str, Any] = {"n_experts": 4, "n_experts_per_token": 2, "hidden_dim": 64}
MODELS = {
    "plain": PLAIN,
    "tied": like(tied_embeddings=True),
    "window": like(sliding_window=W),
    "window in one layer": like(sliding_window=(W, None)),
    "mixture": like(**MIXTURE),
    "mixture with a window": like(sliding_window=W, **MIXTURE),
    "YaRN": like(yarn=YARN),
    "YaRN with longer keys": like(yarn=dataclasses.replace(YARN, apply_scale=True)),
    "growing queries": like(yarn=YARN, llama_4_scaling=Llama4Scaling(0.5, 16)),
}
IDS = [1, *np.random.default_rng(0).integers(3, 300, 4 * W - 1).tolist()]
SENTENCES = ["The square of 7 is 49.", " two  spaces", "naïve 😀\n\n\ttabs", "<s>[INST] x", "a"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers.taught(tmp_path_factory.mktemp("tokenizer"))


def saved(folder: Path, config: MistralConfig, tokenizer: Path) -> Path:
    size = Tokenizer.from_file(tokenizer).vocab_size
    config = dataclasses.replace(config, vocab_size=max(size, config.vocab_size))
    save_weights(folder, config, weights_of(random_model(config)), tokenizer)
    return folder


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"The square of {i} is {i * i}." for i in range(2000)),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    folder = saved(tmp_path / "lechat", PLAIN, tmp_path / "unigram.model")
    with pytest.raises(BadInput, match="is not byte-pair encoding of the text as it is"):
        command.main([str(folder), str(tmp_path / "x.gguf"), "--to", "gguf"])
    assert not (tmp_path / "x.gguf").exists()


def convert(src: Path, dst: Path, *flags: str) -> Path:
    to = "gguf" if dst.suffix else "lechat"
    assert command.main([str(src), str(dst), "--to", to, *flags]) == 0
    return dst


def probabilities(folder: Path) -> np.ndarray:
    """Those of lechat, of every id after each of `IDS`."""
    model = SavedModel.open(folder)
    z = np.asarray(logits_of(model.config, model.load().weights, [IDS])[0], np.float64)
    odds = np.exp(z - z.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


@pytest.fixture
def of_llama(pytestconfig: pytest.Config) -> Callable[[Path, str, Any], Any]:
    """What llama.cpp makes of a file, see `llama.mjs`."""
    folder = npm.packages(pytestconfig, "node-llama-cpp", "@node-llama-cpp/linux-x64")

    def made(path: Path, asked: str, value: Any) -> Any:
        return json.loads(npm.run(LLAMA, str(folder), str(path), asked, json.dumps(value)))

    return made


@pytest.mark.node
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_probabilities(
    name: str, taught: Path, tmp_path: Path, of_llama: Callable
) -> None:
    """At every position, past three windows; measured: 2.2e-4."""
    model = saved(tmp_path / "model", MODELS[name], taught)
    path = convert(model, tmp_path / "model.gguf")
    found = np.array(of_llama(path, "probabilities", IDS))
    np.testing.assert_allclose(found, probabilities(model), rtol=0, atol=5e-4)


# Of K-quants' blocks of 256 numbers, where their scales are, which must not be infinite.
K_QUANTS = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


@pytest.mark.node
@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_the_numbers_that_llama_cpp_reads(
    kind: str,
    taught: Path,
    tmp_path: Path,
    of_llama: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of random bytes as an embedding, whose rows llama.cpp takes without rounding a product."""
    quantize, kind_of, random = gguf.quants.quantize, write_gguf._kind, np.random.default_rng(0)

    def some(numbers: np.ndarray, asked: gguf.GGMLQuantizationType) -> np.ndarray:
        if asked.name != kind:
            return quantize(numbers, asked)
        block, size = gguf.GGML_QUANT_SIZES[asked]
        blocks = random.integers(0, 256, (numbers.size // block, size), np.uint8)
        for at in K_QUANTS[kind]:
            scales = (random.random(len(blocks)) / 5000 + 1e-4).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        return blocks

    def kinds(name: str, shape: Any, of_kernels: str) -> str:
        return kind if name == EMBEDDING else kind_of(name, shape, of_kernels)

    monkeypatch.setattr(gguf.quants, "quantize", some)
    monkeypatch.setattr(write_gguf, "_kind", kinds)
    model = saved(tmp_path / "model", like(dim=256, n_layers=1), taught)
    path = convert(model, tmp_path / "model.gguf")
    found = np.array(of_llama(path, "probabilities", IDS))
    np.testing.assert_allclose(found, probabilities(path), rtol=0, atol=5e-4)
    assert np.abs(found - probabilities(model)).max() > 0.01


@pytest.mark.node
@pytest.mark.parametrize("fault", ["pairs of RoPE", "window"])
def test_a_fault_would_be_seen(
    fault: str,
    taught: Path,
    tmp_path: Path,
    of_llama: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = saved(tmp_path / "model", MODELS["window"], taught)
    if fault == "window":
        other = like(sliding_window=W + 1, vocab_size=SavedModel.open(model).config.vocab_size)
        save_weights(tmp_path / "other", other, SavedModel.open(model).load().weights, taught)
        path = convert(tmp_path / "other", tmp_path / "model.gguf")
    else:
        monkeypatch.setattr(layouts, "_neighbours", lambda array: array)
        path = convert(model, tmp_path / "model.gguf")
    found = np.array(of_llama(path, "probabilities", IDS))
    assert np.abs(found - probabilities(model)).max() > 0.01


@pytest.mark.node
@pytest.mark.parametrize("name", ["v1", "v3", "v7", "v3-tekken"])
def test_llama_cpp_has_the_ids_of_a_text(name: str, tmp_path: Path, of_llama: Callable) -> None:
    tokenizer = tokenizers.tokenizer(name)
    path = convert(
        saved(tmp_path / "model", like(dim=32, n_layers=1), tokenizers.shipped(name)),
        tmp_path / "model.gguf",
    )
    found = of_llama(path, "tokens", SENTENCES)
    assert found == [tokenizer.encode(text) for text in SENTENCES]


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_as_it_was(name: str, taught: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", MODELS[name], taught)
    back = convert(convert(model, tmp_path / "model.gguf"), tmp_path / "back")
    before, after = SavedModel.open(model), SavedModel.open(back)
    assert after.config == before.config
    weights = after.load().weights
    for key, leaf in before.load().weights.items():
        np.testing.assert_array_equal(weights[key], leaf)


@pytest.mark.parametrize(
    "name", ["v1", "v3", "v7", pytest.param("v3-tekken", marks=pytest.mark.slow)]
)
def test_so_does_its_tokenizer(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", like(dim=32, n_layers=1), tokenizers.shipped(name))
    source = open_source(convert(model, tmp_path / "model.gguf"))
    back = Tokenizer.from_file(source.tokenizer_files[-1])
    before = tokenizers.tokenizer(name)
    assert (back.version, back.bos_id, back.eos_id) == (before.version, 1, 2)
    assert back.vocab_size == before.vocab_size
    assert [back.encode(text) for text in SENTENCES] == [*map(before.encode, SENTENCES)]


def test_so_does_a_small_tekken(tmp_path: Path) -> None:
    before = Tokenizer.from_file(tokenizers.small_tekken(tmp_path / "tekken.json", "v13"))
    model = saved(tmp_path / "model", like(dim=32, n_layers=1), before.path)
    (file,) = open_source(convert(model, tmp_path / "model.gguf")).tokenizer_files
    back = Tokenizer.from_file(file)
    assert back.vocab_size == before.vocab_size
    assert back.control_id("[THINK]") == before.control_id("[THINK]")
    assert [back.encode(text) for text in SENTENCES] == [*map(before.encode, SENTENCES)]


def test_float64_becomes_float32(taught: Path, tmp_path: Path) -> None:
    config = like(n_layers=1, vocab_size=Tokenizer.from_file(taught).vocab_size)
    weights = {name: np.asarray(of, np.float64) for name, of in random_weights(config).items()}
    start = write_torch(tmp_path / "start", config, weights)
    shutil.copyfile(taught, start / "tokenizer.model.v1")
    assert open_source(convert(start, tmp_path / "m.gguf")).dtype == np.float32


def test_bfloat16_stays_bfloat16(taught: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", PLAIN, taught)
    path = convert(model, tmp_path / "model.gguf", "--dtype", "bfloat16")
    source = open_source(path)
    assert source.dtype.name == "bfloat16"
    expected = open_source(convert(model, tmp_path / "lechat", "--dtype", "bfloat16"))
    for name in source.names:
        assert source.read(name).tobytes() == expected.read(name).tobytes()


@pytest.mark.parametrize(("kind", "step"), [("q8_0", 1 / 127), ("q5_0", 1 / 16), ("q4_0", 1 / 8)])
def test_kernels_are_quantised_in_blocks_of_32(
    kind: str, step: float, taught: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", like(**MIXTURE), taught)
    path = convert(model, tmp_path / "model.gguf", "--quantize", kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["blk.1.attn_q.weight"] == kind.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    with pytest.raises(BadInput, match=rf"is quantised \({kind.upper()}"):
        open_source(path)
    found, exact = open_source(path, dequantize=True), open_source(model)
    for name in exact.names:
        before = exact.read(name)
        largest = np.abs(before).max()
        np.testing.assert_allclose(found.read(name), before, rtol=0, atol=step * largest)


@pytest.mark.parametrize(("kind", "flag"), [("BF16", "--dtype"), ("Q8_0", "--quantize")])
def test_numbers_are_quantised_thousands_at_a_time(
    kind: str, flag: str, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library works through 16 rows of what it is given in a loop of Python."""
    quant = getattr(gguf.quants, kind)
    real, sizes = quant.quantize_blocks, list[int]()

    def counted(blocks: np.ndarray) -> np.ndarray:
        sizes.append(blocks.size)
        return real(blocks)

    monkeypatch.setattr(quant, "quantize_blocks", counted)
    model = saved(tmp_path / "model", like(dim=256, hidden_dim=1024), taught)
    convert(model, tmp_path / "m.gguf", flag, {"BF16": "bfloat16"}.get(kind, kind.lower()))
    assert sum(sizes) > 1_500_000
    assert np.mean(sizes) > 8_000


def test_added_tokens_padding_and_template_travel_along(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", like(dim=32, n_layers=1), tokenizers.shipped("v3"))
    config = SavedModel.open(model).config
    grown = dataclasses.replace(config, vocab_size=config.vocab_size + 64)
    folder = tmp_path / "grown"
    save_weights(folder, grown, weights_of(random_model(grown)), tokenizers.shipped("v3"))
    added = {"<|im_start|>": config.vocab_size + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "chat_template.jinja").write_text(chat_template("v3"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 32769]}')
    write_manifest(folder)
    path = convert(folder, tmp_path / "grown.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 32769
    assert fields["tokenizer.ggml.tokens"][32769] == "<|im_start|>"
    assert fields["tokenizer.chat_template"] == chat_template("v3")
    back = convert(path, tmp_path / "back")
    assert json.loads((back / "added_tokens.json").read_text()) == added
    assert (back / "chat_template.jinja").read_text() == chat_template("v3")
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [2, 32769]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (like(sliding_window=(4, 8)), "one window for all layers that have any"),
        (like(sliding_window=4, yarn=YARN), "both a sliding window and YaRN"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(config: MistralConfig, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        architecture.architecture(config)


def test_a_destination_is_a_file_and_nothing_half_is_left(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "model", PLAIN, taught)
    for dst, flags, why in (
        ("folder", [], "makes a file, NAME.gguf"),
        ("m.gguf", ["--quantize", "int8"], "is for lechat's own format"),
        ("model", ["--to", "lechat", "--quantize", "q8_0"], "is for GGUF"),
    ):
        with pytest.raises(BadInput, match=why):
            command.main([str(model), str(tmp_path / dst), "--to", "gguf", *flags])
    monkeypatch.setattr(gguf.quants, "quantize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.undo()
    convert(model, tmp_path / "m.gguf")
    with pytest.raises(BadInput, match="exists"):
        convert(model, tmp_path / "m.gguf")
    convert(model, tmp_path / "m.gguf", "--overwrite")


def test_a_damaged_file_and_another_architecture_are_refused(taught: Path, tmp_path: Path) -> None:
    path = convert(saved(tmp_path / "model", PLAIN, taught), tmp_path / "model.gguf")
    content = path.read_bytes()
    for name, damaged, why in (
        ("cut", content[: len(content) // 2], "is no whole GGUF file"),
        ("other", content.replace(b"llama", b"qwen2", 1), "is of the architecture 'qwen2'"),
        ("none", b"something else", "is no whole GGUF file"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(damaged)
        with pytest.raises(BadInput, match=why):
            open_source(tmp_path / f"{name}.gguf")
