"""lm-evaluation-harness: its numbers for a model here are those of its own models."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval")

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.errors import BadInput
from lechat_jax.eval.command import main
from lechat_jax.eval.harness import HarnessModel
from lechat_jax.files.checksums import write_manifest
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import weights_of
from lechat_jax.serve.engine import Engine
from lechat_jax.tokenizer.jinja_template import chat_template
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.convert.command import main as convert
from tests.serve.conftest import live
from tests.support import tokenizers
from tests.support.models import TINY, random_model

lm_eval: Any = importlib.import_module("lm_eval")

LONGEST = 64  # tokens of a question with its answer
MODEL = dataclasses.replace(TINY, n_layers=2, vocab_size=300)
TASKS = {
    "squares": """
output_type: multiple_choice
doc_to_text: "The square of {{n}} is"
doc_to_target: 0
doc_to_choice: ["{{n * n}}.", "{{n + n}}.", "not known to anybody."]
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "squares_as_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "squares_written": """
output_type: generate_until
doc_to_text: "The square of {{n}} is "
doc_to_target: "{{n * n}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks whose questions are in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (
        {"n": n, "text": " ".join(f"The square of {i} is {i * i}." for i in range(n, 3 * n))}
        for n in range(2, 13)
    )
    (folder / "squares.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        where = f"{{data_files: {folder / 'squares.jsonl'}}}"
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {where}\n"
        split = "test_split: train\nfewshot_split: train\n"
        (folder / f"{name}.yaml").write_text(data + split + text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.taught(home)
    weights = weights_of(random_model(MODEL))
    # What is no text is shown otherwise by transformers: bytes alone, and the unknown piece.
    no_text = np.array([0, *Tokenizer.from_file(tokenizer).byte_of])
    weights["head.kernel"] = weights["head.kernel"].at[no_text].set(0)
    save_weights(home / "lechat", MODEL, weights, tokenizer)
    template = chat_template("v1")
    (home / "lechat" / "chat_template.jinja").write_text(template)
    write_manifest(home / "lechat")
    assert convert([str(home / "lechat"), str(home / "hf"), "--to", "hf"]) == 0
    return home


def answers(model: Any, name: str, tasks: Path, **more: Any) -> list[Any]:
    """What a model says to each request of a task."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager(include_path=str(tasks), include_defaults=False),
        **more,
    )
    assert found is not None
    return [said for sample in found["samples"][name] for said in sample["filtered_resps"]]


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
    model = Generator.from_checkpoint(folder / "lechat", dtype="float32")
    return HarnessModel(model, folder / "lechat", LONGEST, batch=3)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder / "hf"),
        device="cpu",
        dtype="float32",
        max_length=LONGEST,
        batch_size=3,
    )


@pytest.mark.parametrize("name", ["squares", "squares_written"])
def test_the_server_gives_the_numbers_of_the_command(
    name: str, ours: HarnessModel, folder: Path, tasks: Path
) -> None:
    """Through OpenAI's API, as `local-completions` asks."""
    models = importlib.import_module("lm_eval.models.openai_completions")
    with Engine(ours.model, 2) as engine, live(engine) as server:
        through = models.LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="tiny",
            tokenizer_backend="huggingface",  # its "remote" one leaves BOS out
            tokenizer=str(folder / "hf"),
            add_bos_token=True,
            max_length=LONGEST,
        )
        found = answers(through, name, tasks)
    for a, b in zip(found, answers(ours, name, tasks), strict=True):
        if name == "squares_written":  # transformers leaves out the space before the first word
            assert a.lstrip() == b.lstrip()
        else:
            assert a == pytest.approx(b, abs=1e-4)


HOWS: list[dict[str, Any]] = [{}, {"num_fewshot": 2}, {"apply_chat_template": True}]
ASKED = [(name, how) for name in TASKS for how in HOWS if name != "squares_as_text" or not how]


@pytest.mark.parametrize(("name", "how"), ASKED, ids=str)
def test_every_request_has_the_answer_of_the_harness_own_model(
    name: str, how: dict[str, Any], ours: HarnessModel, theirs: Any, tasks: Path
) -> None:
    found, expected = (answers(model, name, tasks, **how) for model in (ours, theirs))
    assert len(found) >= 11
    if name == "squares_written":
        assert found == expected
        assert any(found)
        return
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-6)


def test_the_command_prints_the_table_and_writes_the_figures(
    folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    flags = f"--tasks squares,squares_as_text --include-path {tasks} --limit 3 --block {LONGEST}"
    assert main([str(folder / "hf"), *flags.split(), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["n-samples"]["squares"]["effective"] == 3
    accuracy = found["results"]["squares"]["acc,none"]
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    assert found["results"]["squares_as_text"]["bits_per_byte,none"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks no_such_task", "lm_eval knows no task no_such_task; "),
        ("--tasks squares --data x.txt", "^--data: that is of a text, and --tasks have their own"),
        ("--limit 3", "^--limit: that is of --tasks; leave it out"),
        ("--tasks squares --mesh tp=2", "^--tasks runs on one device; leave out --mesh"),
        ("--tasks ,", "^--tasks names no task"),
        ("--tasks squares --batch 0", "--batch must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_run_is_refused(flags: str, message: str, folder: Path, tasks: Path) -> None:
    include = ["--include-path", str(tasks)] if "no_such" in flags else []
    with pytest.raises(BadInput, match=message):
        main([str(folder / "hf"), *flags.split(), *include])
