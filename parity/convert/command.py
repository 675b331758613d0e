"""Converts checkpoints between formats: python -m parity.convert SRC DST --to FORMAT.

SRC is a folder in any format (what it is, is found out), a training run, a GGUF file, or a model of
the Hugging Face Hub such as mistralai/Mistral-7B-v0.1. Nothing is held in memory, whatever the
size of the model, and DST appears when it is complete, or not at all.
"""

import dataclasses
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, cast, get_args

import ml_dtypes
import numpy as np
import tyro
from jaxtyping import Shaped
from rich.console import Console

from lechat_jax.cli import flags
from lechat_jax.cli.display import Meter
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import kernel_of
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_new_folder
from lechat_jax.files.buckets import BucketSync, exists, uri_of
from lechat_jax.files.checksums import sync, write_manifest
from lechat_jax.files.safetensors import Wanted, write_tensors
from lechat_jax.formats.fused_experts import expert_keys, fused
from lechat_jax.formats.layouts import to_format
from lechat_jax.formats.names import STACKED, Format, names, parts, rows, shapes, tied_head
from lechat_jax.formats.open_model import check_complete
from lechat_jax.formats.source import Source
from lechat_jax.quantize.scheme import Form, scheme_for
from lechat_jax.quantize.scheme import Format as Quantization
from lechat_jax.shell import command, quoted
from lechat_jax.tokenizer.tokenizer import preferred
from lechat_jax.tokenizer.vocabulary import control_ids, no_tokenizer
from parity.convert.finite import is_finite
from parity.convert.open_source import open_source
from parity.convert.torch_files import write_pickle
from parity.convert.write import write_config, write_tokenizer
from parity.convert.write_gguf import Quantized, write_gguf

Dtype = Literal["keep", "bfloat16", "float16", "float32"]
DTYPES: dict[Dtype, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
RELEASE = 1 << 28  # bytes read until their memory is given back
SPARE = 1 << 24  # bytes of disk for what are no tensors


@dataclasses.dataclass(frozen=True)
class Convert:
    """The flags of `python -m parity.convert`.

    Attributes:
        src: Folder of a checkpoint or a training run, a GGUF file, either in a bucket (gs:// or
            s3://), or the name of a model on the Hub.
        dst: Folder to make, here or in a bucket (gs:// or s3://); of GGUF the file, NAME.gguf.
        to: Format to write: lechat's, Hugging Face's (hf), Mistral's own (mistral), a state dict
            of lechat_torch (torch), or a file for llama.cpp, Ollama and LM Studio (gguf).
        rope_theta: Base of the rotary frequencies, for a params.json that does not say it.
        revision: Branch, tag or commit of the model on the Hub.
        dtype: Type of the weights to write; with --quantize, of the norms.
        adapter: Folder of adapters in PEFT's format or mistral-finetune's (lora.safetensors), which
            are merged into SRC. Those of a training run are merged without it.
        quantize: Write the kernels as int8 with a scale for each output channel, a quarter of
            float32, or as int4 with one for each group of 128 features, an eighth; there is no way
            back. In lechat's format only; kernels that are stored so already are copied. In GGUF
            as q8_0, q5_0 or q4_0, with a scale for each 32 features.
        dequantize: Write quantised weights (GPTQ, AWQ, compressed-tensors) as floats, in lechat's
            format too. Those of GGUF always are.
        text_only: Leave the vision tower out, as GGUF does, which has it in another file.
        shard_gb: Most GB of weights in a file; 0 is one file. Mistral's own and torch have one.
        allow_nonfinite: Write weights that are infinite or not a number too.
        overwrite: Replace a checkpoint at DST, once the new one is complete.
    """

    src: tyro.conf.Positional[str]
    dst: tyro.conf.Positional[Path]
    to: Format
    rope_theta: float | None = None
    revision: str | None = None
    dtype: Dtype = "keep"
    adapter: Path | None = None
    quantize: Quantization | Quantized | None = None
    dequantize: bool = False
    text_only: bool = False
    shard_gb: float = 5.0
    allow_nonfinite: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.shard_gb >= 0:
            raise BadInput(f"--shard-gb must be at least 0, not {self.shard_gb}")
        if self.quantize in get_args(Quantized) and self.to != "gguf":
            raise BadInput(f"--quantize {self.quantize} is for GGUF; say --to gguf")
        if self.quantize in get_args(Quantization) and self.to != "lechat":
            raise BadInput(
                f"--quantize {self.quantize} is for lechat's own format, which no other program "
                "reads; leave it out, or say --to lechat"
            )
        if (self.dst.suffix == ".gguf") != (self.to == "gguf"):
            wanted = "a file, NAME.gguf" if self.to == "gguf" else "a folder, and a .gguf is a file"
            raise BadInput(f"--to {self.to} makes {wanted}, not {self.dst}")
        if self.quantize and self.allow_nonfinite:
            raise BadInput(f"{self.quantize} has no infinite numbers; leave out --allow-nonfinite")
        if self.quantize and self.dequantize:
            raise BadInput("--quantize and --dequantize contradict each other; leave out one")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    options = flags.parse(Convert, "parity.convert", __doc__ or "", argv)
    if uri := uri_of(options.dst):
        _to_bucket(options, uri)
    else:
        _converted(options)
    return 0


def _converted(options: Convert) -> None:
    """Converts, and tells what was written."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    check_destination(options)
    source = open_source(
        options.src,
        rope_theta=options.rope_theta,
        revision=options.revision,
        verify=False,
        dequantize=True,
        adapter=options.adapter,
        dtype=None if options.dtype == "keep" else DTYPES[options.dtype],
        text_only=options.text_only or options.to == "gguf",
    )
    form = form_to_write(source, options)
    meter = convert(source, options, console)
    print(
        f"{options.dst}: {len(source.names)} tensors, {meter.done / 1e9:.2f} GB of "
        f"{form or options.quantize or _dtype(source, options).name} in {meter.seconds:.1f} s "
        f"({meter.done / 1e9 / meter.seconds:.2f} GB/s), {source.format} to {options.to}"
    )
    if source.quantization:
        stays = form is not None and form is source.store.form
        what = "and stays so" if stays else "these are the numbers it stands for"
        print(f"{options.src} is {source.quantization}: {what}")
    for note in source.store.notes:
        print(f"{options.src}: {note}")
    for line in _what_next(source, options):
        print(line)


def _to_bucket(options: Convert, uri: str) -> None:
    """Converts into a folder that is deleted again once it is in the bucket, its manifest last."""
    if options.overwrite:
        raise BadInput(f"{uri} is in a bucket, where nothing is replaced; name another folder")
    if exists(uri):
        raise BadInput(f"{uri} exists; name another folder")
    with tempfile.TemporaryDirectory(prefix="lechat-") as folder:
        parent, _, name = uri.rpartition("/")
        _converted(dataclasses.replace(options, dst=Path(folder) / name))
        print(f"uploading to {uri}", file=sys.stderr, flush=True)
        BucketSync(Path(folder), parent).finish()
        print(f"{uri}: uploaded")


def _what_next(source: Source, options: Convert) -> Iterator[str]:
    """The commands to use what was written, and to see whether it is right."""
    src, dst = options.src, options.dst
    if options.to == "gguf":
        yield f"run:       {quoted(['llama-cli', '-m', str(dst)])}"
        if any(source.config.windows):
            yield "note:      its sliding window needs a llama.cpp of July 2026 or newer"
        return
    said = {"rope_theta": options.rope_theta, "revision": options.revision}
    if options.to == "lechat":
        if preferred(dst.iterdir()):
            yield f"generate:  {command('lechat_jax.generate', dst, prompt='TEXT')}"
        else:
            yield f"note:      {no_tokenizer(dst, 'it reads and writes ids alone')}"
            bos_id = control_ids(dst).get("bos_token_id", 1)
            yield f"generate:  {command('lechat_jax.generate', dst, prompt_ids=str(bos_id))}"
    if options.quantize and source.format in ("lechat", "run") and not options.adapter:
        yield f"measure:   {command('parity.quality', src, against=dst)}"
    elif options.quantize:
        whole = Path(f"{dst}-whole")
        said |= {"adapter": options.adapter, "to": "lechat"}
        yield f"measure:   {command('parity.convert', src, whole, **said)}"
        yield f"and then:  {command('parity.quality', whole, against=dst)}"
    elif not source.quantization and not options.adapter and not options.text_only:
        yield f"compare:   {command('parity.check', checkpoint=src, against=dst, **said)}"


def convert(source: Source, options: Convert, console: Console) -> Meter:
    """Writes the source in the format of the options; returns the meter of bytes and seconds.

    Raises:
        BadInput: the disk has too little room, the format has no words for the model, or a
            weight is not finite; then nothing is left behind.
    """
    dtype, form = _dtype(source, options), form_to_write(source, options)
    infos = _wanted(source, options.to, dtype, form)
    total = sum(int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in infos)
    dst = options.dst.absolute()
    partial = dst.with_name(f".{dst.name}.partial")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        if (free := shutil.disk_usage(dst.parent).free) < total + SPARE:
            raise BadInput(
                f"{dst} takes {total / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room"
            )
        new = partial / "new"
        new.mkdir(parents=True)
        meter = Meter(total, console)
        with meter, ThreadPoolExecutor(1) as beside:
            # The source is verified while it is read, and nothing appears before that is done.
            whole = (
                beside.submit(check_complete, source.path) if source.format == "lechat" else None
            )
            if options.to != "gguf":  # which is one file
                write_config(new, options.to, source, dtype, form)
                write_tokenizer(new, options.to, source)
            _write_weights(new, infos, source, options, form, meter)
            if whole:
                whole.result()
        _appear(new / dst.name if options.to == "gguf" else new, dst, partial / "old")
    except OSError as error:
        raise BadInput(f"cannot write {error.filename or dst}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meter


def _write_weights(
    folder: Path,
    infos: list[Wanted],
    source: Source,
    options: Convert,
    form: Form | None,
    meter: Meter,
) -> None:
    """Writes the weights into the folder; in lechat's format the manifest, too."""
    config, fmt = source.config, options.to
    table = rows(config)
    ours = {theirs: name for name, theirs in names(config, fmt).items()}
    kernels_in = {key: expert_keys(key, config.n_experts) for key, _, _ in infos}
    sizes = {key: (dtype, shape) for key, dtype, shape in infos}

    waiting: dict[str, np.ndarray] = {}  # parts of the kernel read last

    def read(key: str) -> Shaped[np.ndarray, "..."]:
        if key in waiting:
            return waiting.pop(key)
        return joined(key) if kernels_in[key] else read_one(key)

    def joined(key: str) -> Shaped[np.ndarray, "E F D"]:
        kernels = np.empty(sizes[key][1], sizes[key][0])
        each = kernels.reshape(len(kernels_in[key]), -1, kernels.shape[-1])
        with np.errstate(over="ignore"):  # it becomes infinite, which is refused
            for i, one in enumerate(kernels_in[key]):
                each[i] = read_one(one)
        source.release()
        return kernels

    def read_one(key: str) -> Shaped[np.ndarray, "..."]:
        if form and form.format_of(key):
            waiting.update(source.parts_of(key, form))
            source.release()
            return waiting.pop(key)
        array, row = source.read(ours[key]), table.get(ours[key])
        return array if row is None else to_format(array, config, fmt, row)

    def check(key: str, piece: Shaped[np.ndarray, "..."]) -> None:
        is_finite_anyway = np.issubdtype(piece.dtype, np.integer) or options.allow_nonfinite
        if not is_finite_anyway and not is_finite(piece):
            name = ours.get(key) or (infinite(key) if kernels_in[key] else kernel_of(key))
            raise BadInput(_complaint(source, name, piece.dtype))

    def infinite(key: str) -> str:
        kernels = joined(key)
        each = zip(kernels_in[key], kernels.reshape(len(kernels_in[key]), -1), strict=True)
        return next(ours[one] for one, kernel in each if not is_finite(kernel))

    def count(n: int) -> None:
        before = meter.done
        meter.add(n)
        if before // RELEASE != meter.done // RELEASE:
            source.release()

    if fmt == "gguf":
        path, quantized = folder / options.dst.name, cast("Quantized | None", options.quantize)
        dtype = _dtype(source, options)
        write_gguf(path, source, dtype, quantized, infos, read, count, check)
        return
    if fmt == "torch":
        head = tied_head(config, fmt)
        aliases = {head: names(config, fmt)["embed.kernel"]} if head else {}
        path = folder / "model.pt"
        write_pickle(path, infos, aliases, read, on_bytes=count, on_slab=check)
        return
    digests: dict[str, str] = {}
    one_file = fmt == "mistral" or not options.shard_gb
    write_tensors(
        folder,
        "consolidated" if fmt == "mistral" else "model",
        infos,
        read,
        shard_bytes=None if one_file else int(options.shard_gb * 1e9),
        metadata={"format": "pt", **source.metadata},
        on_bytes=count,
        on_slab=check,
        on_file=(lambda path, digest: digests.update({path.name: digest}))
        if fmt == "lechat"
        else None,
    )
    if fmt == "lechat":
        write_manifest(folder, digests)


def _wanted(source: Source, fmt: Format, dtype: np.dtype, form: Form | None) -> list[Wanted]:
    """Name, dtype and shape of each tensor to write, in the order in which they are best read.

    The parts of a kernel are known when that has been read, so they come one behind the other.
    """
    found, sizes = names(source.config, fmt), shapes(source.config, fmt)
    wanted: list[Wanted] = []
    of = {name: [name] for name in source.names} if fmt in STACKED else parts(source.config)
    for name in itertools.chain.from_iterable(of[name] for name in source.names):
        its_parts = form.parts(name, sizes[name]) if form else {}
        wanted += [(key, its_dtype, shape) for key, (its_dtype, shape) in its_parts.items()]
        if not its_parts:
            wanted.append((found[name], dtype, sizes[name]))
    return _fused(wanted, source.config) if fmt == "hf" else wanted


def _fused(wanted: list[Wanted], config: MistralConfig) -> list[Wanted]:
    """The same with the kernels of Mistral 4's experts in as many tensors as its files have."""
    of_one = {key: (dtype, shape) for key, dtype, shape in wanted}
    found: list[Wanted] = []
    for key, of in fused(of_one, config.n_experts).items():
        dtype, shape = of_one[of[0]]
        is_fused = of != [key]
        E = config.n_experts
        found.append((key, dtype, (E, len(of) // E * shape[0], *shape[1:]) if is_fused else shape))
    return found


def form_to_write(source: Source, options: Convert) -> Form | None:
    """How the kernels are quantised when they are written, if they are.

    Raises:
        BadInput: they are so already.
    """
    stored = source.store.form
    if options.to == "gguf":
        return None
    if options.quantize and source.quantization and source.format == "lechat":
        raise BadInput(f"{options.src} is {source.quantization} already; copy the folder")
    if stored and options.to == "lechat" and options.quantize in (None, stored.format):
        return None if options.dequantize else stored
    return scheme_for(cast("Quantization | None", options.quantize), source.config)


def _dtype(source: Source, options: Convert) -> np.dtype:
    return source.dtype if options.dtype == "keep" else DTYPES[options.dtype]


def _complaint(source: Source, name: str, dtype: np.dtype) -> str:
    """What is wrong with a weight, which may have been finite before it was cast."""
    original = source.stored_of(name).dtype
    cast = "" if original == dtype else f" as {dtype.name} (it is {original.name})"
    return (
        f"{source.where(name)} is not finite{cast}; the file is damaged or the training "
        "diverged, and --allow-nonfinite writes it all the same"
    )


def check_destination(options: Convert) -> None:
    """Raises `BadInput` for a place that must not be written to."""
    dst, src = options.dst.absolute(), Path(options.src).absolute()
    is_file = options.to == "gguf"
    if not os.path.exists(dst):
        check_new_folder(dst.parent if is_file else dst)
        return
    if dst.resolve() == src.resolve() or src.resolve().is_relative_to(dst.resolve()):
        raise BadInput(f"{options.dst} is the source, or around it; name another folder")
    if not options.overwrite:
        raise BadInput(f"{options.dst} exists; name another folder, or pass --overwrite")
    configs = [dst / name for name in ("config.json", "params.json")]
    is_checkpoint = dst.is_dir() and (
        not any(dst.iterdir()) or any(path.is_file() for path in configs)
    )
    if not (dst.is_file() if is_file else is_checkpoint):
        raise BadInput(f"{options.dst} is no checkpoint, so it is not overwritten")
    check_new_folder(dst.parent)


def _appear(new: Path, dst: Path, old: Path) -> None:
    """The new folder or file under its name, for good: synced, and in the place of an old one."""
    for path in (*(new.iterdir() if new.is_dir() else ()), new):
        sync(path)
    if dst.exists():
        dst.rename(old)
    new.rename(dst)
    sync(dst.parent)
