"""Publishes a model on the Hugging Face Hub: python -m parity.push SRC user/name.

SRC is anything that parity.convert reads: a training run (its adapters are merged), or a model of
any format. It is written in Hugging Face's format or as a GGUF, with a model card that says how it
was trained and measured, and appears on the Hub in one commit, or not at all. Log in with: hf auth
login.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from rich.console import Console

from lechat_jax.checkpoint.run import HELD_OUT, Run
from lechat_jax.cli import flags
from lechat_jax.errors import BadInput
from lechat_jax.formats.hub import is_name
from lechat_jax.formats.source import Source
from parity.convert.command import DTYPES, Convert, Dtype, check_destination, convert
from parity.convert.open_source import open_source

CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Push:
    """The flags of `python -m parity.push`.

    Attributes:
        src: Folder of a training run or of a model in any format, or a GGUF file.
        name: Name of the model on the Hub, user/name; it is made if it is not there.
        to: Format to publish: Hugging Face's (hf), or a file for llama.cpp, Ollama and LM Studio
            (gguf).
        dtype: Type of the weights; by default as they are.
        private: Make a new model private.
        revision: Branch to commit to; it has to be there. By default the main one.
        license: Licence that the card names, such as apache-2.0. By default none.
        keep: Folder to write to and leave; by default one that is deleted. With --dry-run it is
            all that happens.
        dry_run: Write the folder of --keep and publish nothing.
    """

    src: tyro.conf.Positional[str]
    name: tyro.conf.Positional[str]
    to: Literal["hf", "gguf"] = "hf"
    dtype: Dtype = "keep"
    private: bool = False
    revision: str | None = None
    license: str | None = None
    keep: Path | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise BadInput(f"{self.name} is no name of a model on the Hub; say user/name")
        if self.dry_run and self.keep is None:
            raise BadInput("--dry-run writes a folder and nothing else; name it with --keep")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    options = flags.parse(Push, "parity.push", __doc__ or "", argv)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _folder(options) as folder:
        source = open_source(
            options.src,
            dequantize=True,
            dtype=None if options.dtype == "keep" else DTYPES[options.dtype],
            text_only=options.to == "gguf",
        )
        gguf = folder / f"{options.name.partition('/')[2]}.gguf"
        asked = Convert(
            src=options.src,
            dst=folder / "model" if options.to == "hf" else gguf,
            to=options.to,
            dtype=options.dtype,
        )
        check_destination(asked)
        convert(source, asked, console)
        for note in source.store.notes:
            print(f"{options.src}: {note}")
        if options.to == "hf":  # which is a folder, and whose files go to the top
            for path in asked.dst.iterdir():
                path.rename(folder / path.name)
            asked.dst.rmdir()
        (folder / CARD).write_text(card(options, source), encoding="utf-8")
        if options.dry_run:
            print(f"{folder}: what would be {options.name}")
        else:
            print(_publish(options, folder))
    return 0


@contextlib.contextmanager
def _folder(options: Push) -> Iterator[Path]:
    """The folder to write to: a new one, which is deleted in the end unless it was named."""
    if options.keep is None:
        with tempfile.TemporaryDirectory(prefix="lechat-push-") as folder:
            yield Path(folder)
        return
    try:
        options.keep.mkdir(parents=True)
    except FileExistsError:
        raise BadInput(f"{options.keep} exists; name another folder with --keep") from None
    except OSError as error:
        raise BadInput(f"cannot make {options.keep}: {error.strerror}") from error
    yield options.keep


def card(options: Push, source: Source) -> str:
    """The model card: what the model is, how it was trained and measured, how to run it."""
    run = Run(source.path) if source.format == "run" else None
    train = run.config["train"] if run else {}
    fields = {
        "library_name": "transformers" if options.to == "hf" else "gguf",
        "pipeline_tag": "image-text-to-text" if source.config.vision else "text-generation",
        "license": options.license,
        "base_model": source.metadata.get("source") or _name_of(train.get("init_from")),
        "tags": ["mistral", "lechat"],
    }
    said = yaml.safe_dump({key: value for key, value in fields.items() if value}, sort_keys=False)
    lines = [f"---\n{said}---", "", f"# {options.name}", ""]
    lines += [_what_it_is(source), ""]
    if run:
        lines += ["## How it was trained", "", *_table(_trained(run, train)), ""]
        if measured := _measured(run):
            lines += ["## How it was measured", "", measured, ""]
    return "\n".join([*lines, "## How to run it", "", *_how_to_run(options, source), ""])


def _what_it_is(source: Source) -> str:
    config = source.config
    windows = sorted({window for window in config.windows if window is not None})
    attention = f"a sliding window of {', '.join(map(str, windows))}" if windows else "no window"
    experts = f", {config.n_experts} experts a layer" if config.n_experts else ""
    return (
        f"A Mistral of {config.n_params:,} weights: {config.n_layers} layers{experts}, "
        f"{config.n_heads} query heads and {config.n_kv_heads} key-value heads, {attention}, "
        f"{config.vocab_size:,} ids{', behind a vision tower' if config.vision else ''}."
    )


def _trained(run: Run, train: dict[str, Any]) -> dict[str, Any]:
    """How a run was trained, in the words of its flags; of paths only the last name."""
    last: dict[str, Any] = {}
    for row in run.metrics():
        last |= row
    said = {
        "text": Path(train.get("corpus", "")).name,
        "its SHA-256": train.get("corpus_sha256"),
        "started from": _name_of(train.get("init_from")) or Path(train.get("init_from") or "").name,
        "LoRA rank": train.get("lora_rank"),
        "tokens": f"{last['tokens']:,}" if "tokens" in last else None,
        "steps": f"{last['step']:,}" if "step" in last else None,
    }
    names = ("batch", "block", "optimizer", "learning_rate", "weight_decay", "dtype", "seed")
    return {key: value for key, value in said.items() if value} | {
        name.replace("_", " "): train[name] for name in names if train.get(name) is not None
    }


def _measured(run: Run) -> str:
    """The last score on held-out text, as a sentence; empty if there is none."""
    scores = [row for row in run.metrics() if "val/bpb" in row]
    if not scores:
        return ""
    last = scores[-1]
    n = last["val/tokens"]
    of = last.get(HELD_OUT, n)
    return (
        f"{last['val/bpb']:.4f} bits per byte, {last['val/loss']:.4f} nats per token, on {n:,} of "
        f"{of:,} tokens of the text that were held out of the training."
    )


def _table(fields: dict[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for key, value in fields.items():
        text = str(value).replace("|", "\\|").replace("\n", " ")
        yield f"| {key} | {text} |"


def _how_to_run(options: Push, source: Source) -> list[str]:
    name = options.name
    if options.to == "gguf":
        return ["```sh", f"llama-cli -hf {name}", "```"]
    if source.config.vision:
        theirs = (
            "from transformers import AutoModelForImageTextToText",
            f'model = AutoModelForImageTextToText.from_pretrained("{name}")',
        )
        ours = 'chat().say("What is it?", ["image.png"])'
    elif source.config.latent_attention:  # which transformers' pipeline does not know
        theirs = (
            "from transformers import Mistral4ForCausalLM",
            f'model = Mistral4ForCausalLM.from_pretrained("{name}")',
        )
        ours = 'generate("Our fathers").text'
    else:
        theirs = (
            "from transformers import pipeline",
            f'print(pipeline("text-generation", "{name}")("Our fathers"))',
        )
        ours = 'generate("Our fathers").text'
    loaded = ("import lechat_jax as lechat", f'print(lechat.load("{name}").{ours})')
    return [*_python(*theirs), "", "or in JAX:", "", *_python(*loaded)]


def _python(first: str, then: str) -> list[str]:
    """A block of Python: an import, and what is done with it."""
    return ["```python", first, "", then, "```"]


def _name_of(path: Any) -> str | None:
    """The name on the Hub that a run was started from, if it was one."""
    return path if isinstance(path, str) and is_name(path) and not Path(path).exists() else None


def _publish(options: Push, folder: Path) -> str:
    """Uploads the folder as one commit; returns the address of the commit.

    Raises:
        BadInput: huggingface_hub is missing, nobody is logged in, or the Hub refuses.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise BadInput("huggingface_hub is not installed: pip install 'lechat-jax[hf]'") from None
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(options.name, private=options.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=options.name,
            folder_path=folder,
            revision=options.revision,
            commit_message=f"Publish {options.name} with lechat",
        )
    except huggingface_hub.errors.RevisionNotFoundError:
        raise BadInput(f"{options.name} has no branch {options.revision}") from None
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{options.name} cannot be published: {reason}; if nobody is logged in, do so with: "
            "hf auth login"
        ) from None
    return str(done.commit_url)


if __name__ == "__main__":
    flags.run(main)
