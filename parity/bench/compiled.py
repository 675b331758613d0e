"""Compiled programs: bytes moved, memory and roofline time on a TPU or GPU that is not there."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from rich.console import Console

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig, preset
from lechat_jax.config.layout import PROJECTOR, TOWER, is_expert
from lechat_jax.config.vision import CHANNELS
from lechat_jax.data.rows import Images, Rows
from lechat_jax.devices.mesh import (
    HEADS,
    ROWS,
    bytes_on_a_device,
    check_divides,
    described,
    mesh_of,
    on_mesh,
    sizes_of,
)
from lechat_jax.devices.platform import compiling_for
from lechat_jax.devices.topologies import ENVIRONMENT, Chip, chip, devices
from lechat_jax.errors import BadInput
from lechat_jax.generate.decode import calls_for
from lechat_jax.generate.prefill import chunk_sizes
from lechat_jax.generate.vision import image_features, padded_length
from lechat_jax.ops.attention_backend import slots_at_once
from lechat_jax.ops.device_forms import for_device
from lechat_jax.ops.remat import Remat
from lechat_jax.quantize.scheme import scheme_for
from lechat_jax.train.flops import flops_per_token
from lechat_jax.train.memory_plan import of_layers
from lechat_jax.train.step import StepOptions, init_state, jitted_steps
from parity.bench import isolated
from parity.bench.decoders.contestants import chosen_part
from parity.bench.program import Move, Program, total
from parity.bench.vision import tower_of
from parity.bench.work import Work, cell, first_line
from parity.report import Report, Row, TableText

Kind = Literal["decode", "prefill", "train", "vision"]
Form = Literal["bfloat16", "float32", "int8", "int4"]
SHOWN = 10  # instructions that move most
# On a GPU kernels are chosen by timing them, and there is nothing to time on.
CUDA_OPTIONS = {"xla_gpu_autotune_level": 0}


class Case(NamedTuple):
    """One program to compile."""

    kind: Kind
    weights: Form
    batch: int


@dataclasses.dataclass(frozen=True)
class Compiled(Work):
    """Programs compiled for a TPU or GPU that need not be there: bytes, memory, roofline time.

    The functions that run are compiled by the compilers of the device, libtpu (`pip install
    'lechat-jax[aot]'`) or JAX's CUDA plugin, each program in a process of its own. Bytes of device
    memory are counted in the final program: of one step, on one device, beside the least that any
    program must move. Time is the roofline of published peaks; nothing is run.
    """

    topology: str = "v6e:1x1"
    """Devices: a chip and its number or grid, such as v6e:2x4, v5p:2x2x2, h100 or h100:8."""
    preset: str = "mistral-7b-v0.1"
    """Model: a name such as mistral-7b-v0.1 or lechat-15m."""
    work: tuple[Kind, ...] = ("decode", "prefill")
    """Programs: decode, prefill, train or vision, of which the preset must have a tower."""
    weights: tuple[Form, ...] = ("bfloat16",)
    """Forms of the weights: bfloat16, float32, int8 or int4; training computes in bfloat16."""
    mesh: str | None = None
    """Devices that share the work, such as tp=8; by default one."""
    context: int = 4096
    """Positions of layers without a window; tokens of a row in training."""
    batch: tuple[int, ...] = (1,)
    """Rows at once, of which prefill takes one at a time; of vision images, as large as can be."""
    chunk: int | None = None
    """Tokens of a prefill chunk; by default what is chosen for the platform."""
    remat: Remat = "none"
    """What a layer keeps for its backward pass: none, dots or full."""
    layers: int | None = None
    """Number of layers, those of the tower in vision, instead of the preset's, to compile less."""

    COUNTS = ("context", "batch")
    AMOUNTS = ("read_gb", "chunk", "layers")

    def run(self, console: Console) -> Report:
        """See `Work.run`; what does not compile becomes a row that says why."""
        chip(self.topology)
        self.config()
        if self.mesh:
            sizes_of(self.mesh)
        if self.work.count("vision"):
            tower_of(self.preset, self.layers)
            if self.mesh:
                raise BadInput("--work vision is compiled for one device; leave out --mesh")
        report = Report(f"compiled for {self.topology}, not run", 0.0, [])
        for case in self.programs():
            label = f"{case.kind}, {case.weights}, {case.batch} rows"
            console.print(label, markup=False)
            try:
                with _environment():
                    (row,) = isolated.run("not compiled", compiled, self, case)
            except BadInput as error:
                of = (case.kind, "lechat_jax", case.weights, case.batch, self.context)
                row = Row(*of, None, None, note=str(error))
            report.rows.append(row)
            for line in row.details.get("moves_most", []):
                console.print(f"  {line['bytes'] / 1e6:10.1f} MB  {line['what']}", markup=False)
        console.print(figures(report.rows).rich(console.is_terminal))
        for note in (*(row.note for row in report.rows if row.note), report.machine):
            console.print(note, markup=False)
        return report

    def config(self) -> MistralConfig:
        """The model, with as many layers as are asked for."""
        found = preset(self.preset).text
        return found if self.layers is None else of_layers(found, self.layers)

    def programs(self) -> list[Case]:
        """What is compiled, in order; training once for each number of rows."""
        return [
            Case(kind, form, batch)
            for kind in self.work
            for form in (self.weights if kind != "train" else self.weights[:1])
            for batch in self.batch
        ]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The environment of a process that compiles for devices that are not there.

    libtpu ends at a flag of XLA that it does not know, such as those for a CPU.
    """
    before = dict(os.environ)
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith("--xla_cpu_"))
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in before}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


class Lowering(NamedTuple):
    """A jitted function, its arguments as they lie on the devices, and what it has to do.

    Attributes:
        function: jitted.
        arguments: descriptions, with their places.
        least: bytes of device memory on one device that any program must move in a step.
        flops: of the model, on one device.
        ring: axes of a ring on one device; none in training.
        chunk: tokens of a prefill chunk.
        blocks: in which a full ring is read; in vision, the layers.
    """

    function: Any
    arguments: tuple[Any, ...]
    least: int
    flops: float
    ring: tuple[int, ...] = ()
    chunk: int = 0
    blocks: int = 1


def compiled(work: Compiled, case: Case) -> Iterator[Row]:
    """The job of an isolated process: compiles one program and counts what is in it."""
    device, found = chip(work.topology), devices(work.topology)
    mesh = _mesh(work, found)
    config = work.config()
    if mesh:
        check_divides(mesh, config, case.batch if case.kind == "train" else None)
    with compiling_for(device.platform), on_mesh(mesh):
        if case.kind == "train":
            lowering = _training(work, config, case, mesh)
        elif case.kind == "vision":
            lowering = _vision(work, case)
        else:
            lowering = _generation(work, config, case, mesh)
        place = None if mesh else SingleDeviceSharding(found[0])
        arguments = _placed(lowering.arguments, place)
        began = time.perf_counter()
        cuda = device.platform == "gpu"
        lowered = lowering.function.trace(*arguments).lower(
            lowering_platforms=("cuda" if cuda else "tpu",)
        )
        then = time.perf_counter()
        try:
            made = lowered.compile(compiler_options=CUDA_OPTIONS if cuda else None)
        except RuntimeError as error:  # XLA's own
            raise BadInput(f"the compiler refused it: {first_line(error)[:300]}") from None
        ended = time.perf_counter()
    details = _counted(made, lowering, device, case.kind)
    details |= {
        "platform": "cuda" if cuda else "tpu",
        "topology": work.topology,
        "preset": work.preset,
        "weights": case.weights,
        "mesh": work.mesh,
        "chunk": lowering.chunk or None,
        "lower_s": then - began,
        "compile_s": ended - then,
    }
    note = details.pop("note")
    row = (case.kind, "lechat_jax", case.weights, case.batch, work.context, None)
    yield Row(*row, details["device_bytes"], note=note, details=details)


def _counted(made: Any, lowering: Lowering, device: Chip, kind: Kind) -> dict[str, Any]:
    """What the compiled program moves, computes and takes, on one device."""
    memory, note = made.memory_analysis(), ""
    scratch = memory.temp_size_in_bytes
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needs = held + scratch + memory.generated_code_size_in_bytes
    moves: list[Move] = []
    try:
        text = made.as_text()
    except RuntimeError as error:  # libtpu cannot print every program
        cost = made.cost_analysis() or {}
        moved, flops = int(cost.get("bytes accessed", 0)), int(cost.get("flops", 0))
        per_call, copies, collectives, early = 0, 0, {}, (0, 0)
        note = f"counted by the compiler, loops once: its text cannot be had ({first_line(error)})"
    else:
        program = Program(text, lowering.blocks)
        is_whole = kind in ("prefill", "vision")
        step = program.entry if is_whole else program.step()
        moves = program.moves(step)
        moved, flops = total(moves), program.flops(step)
        per_call = 0 if is_whole else total(program.moves_once(step))
        copies = program.copies(lowering.ring) if lowering.ring else 0
        collectives, early = program.collectives(step), program.asynchronous(step)
    return {
        "bytes_moved": moved,
        "bytes_least": lowering.least,
        "bytes_per_call": per_call,
        "ring_copies": copies,
        "scratch_bytes": scratch,
        "device_bytes": needs,
        "fits": needs <= device.memory,
        "flops": flops,
        "model_flops": lowering.flops,
        "collectives": {name: {"n": n, "bytes": size} for name, (n, size) in collectives.items()},
        "collectives_hidden": early[0],
        "collectives_waited_for": early[1],
        "program_bytes": memory.generated_code_size_in_bytes,
        "roofline_s": max(moved / device.bandwidth, lowering.flops / device.flops),
        "moves_most": [
            {"bytes": move.bytes, "what": f"{move.instruction.op} {move.where[-70:]}"}
            for move in sorted(moves, key=lambda move: -move.bytes)[:SHOWN]
        ],
        "note": note,
    }


def _generation(work: Compiled, config: MistralConfig, case: Case, mesh: Mesh | None) -> Lowering:
    """Prefill or decode with weights in that form."""
    weights = _weights(config, case.weights)
    chunk = work.chunk or chunk_sizes(config, work.context)[-1]
    calls = calls_for(config, for_device(weights), case.batch, (chunk,), work.context, 0, mesh)
    call = calls[case.kind]
    arguments = call.arguments
    cache = arguments[2].cache if case.kind == "decode" else arguments[2]
    ways = mesh.size if mesh else 1
    rings = bytes_on_a_device(cache)
    if case.kind == "prefill":
        rings = -(-rings // (case.batch // (mesh.shape[ROWS] if mesh else 1) or 1))
    tokens = chunk if case.kind == "prefill" else case.batch
    keys = sum(min(ring.capacity, work.context) * len(ring.k) for ring in cache.rings)
    N, H, U = config.shape("NHU")
    flops = 2 * config.n_products + 2 * N * (H + U) * keys
    k = cache.rings[0].k[0]
    ring = k.sharding.shard_shape(k.shape) if k.sharding else k.shape
    # All experts that are chosen may be one device's.
    part = chosen_part(config, tokens * (mesh.shape[HEADS] if mesh else 1))
    least = sum(
        bytes_on_a_device(leaf) * (part if is_expert(name) else 1)
        for name, leaf in arguments[1].items()
    )
    least = round(least) + rings
    blocks = -(-ring[2] // slots_at_once(ring[2], chunk if case.kind == "prefill" else 1))
    return Lowering(call.function, arguments, least, flops * tokens / ways, ring, chunk, blocks)


def _vision(work: Compiled, case: Case) -> Lowering:
    """Vision tower and projector of images that are as large as the model admits."""
    config = tower_of(work.preset, work.layers)
    assert config.vision is not None
    weights = for_device(_weights(config, case.weights))
    tower, p = config.vision, config.vision.patch_size
    P = padded_length((tower.max_image_size // p) ** 2, tower.n_merged)
    images = jax.eval_shape(
        lambda: Images(
            jnp.zeros((case.batch, P, CHANNELS, p, p), jnp.float32),
            jnp.zeros((case.batch, P, 2), jnp.int32),
        )
    )
    features = jax.eval_shape(functools.partial(image_features, config), weights, images)
    seeing = {name: leaf for name, leaf in weights.items() if name.startswith((TOWER, PROJECTOR))}
    products = {
        part: sum(leaf.size for name, leaf in seeing.items() if name.startswith(part))
        for part in (TOWER, PROJECTOR)
    }
    flops = 2 * P * (products[TOWER] + products[PROJECTOR] / tower.n_merged)
    flops += 4 * P * P * tower.dim * tower.n_layers
    least = bytes_on_a_device((seeing, images, features))
    arguments = (config, weights, images)
    # The layers are one loop, which libtpu does not say the length of.
    return Lowering(image_features, arguments, least, flops * case.batch, blocks=tower.n_layers)


def _weights(config: MistralConfig, given: Form) -> dict[str, jax.ShapeDtypeStruct]:
    """Descriptions of the weights in that form."""
    form = scheme_for(given if given == "int8" or given == "int4" else None, config)
    dtype = jnp.dtype("float32" if given == "float32" else "bfloat16")
    return {
        name: leaf if form and form.is_fixed(name) else jax.ShapeDtypeStruct(leaf.shape, dtype)
        for name, leaf in weight_shapes(config, form).items()
    }


def _training(work: Compiled, config: MistralConfig, case: Case, mesh: Mesh | None) -> Lowering:
    """A step of training: state and gradient are read and written once, at the least."""
    options = StepOptions(dtype="bfloat16", remat=work.remat, mesh=mesh)
    alone = dataclasses.replace(options, mesh=None)
    state = described(mesh, jax.eval_shape(lambda: init_state(config, alone, seed=0)))
    rows = Rows(jax.ShapeDtypeStruct((1, case.batch, work.context + 1), jnp.int32))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = case.batch * work.context
    flops = flops_per_token(config, work.context) * tokens / (mesh.size if mesh else 1)
    arguments = (config, options, state, {}, rows, number, number)
    return Lowering(jitted_steps(options), arguments, 2 * bytes_on_a_device(state), flops)


def _mesh(work: Compiled, found: list[Any]) -> Mesh | None:
    if work.mesh is None:
        return None
    sizes = sizes_of(work.mesh)
    n = sizes[ROWS] * sizes[HEADS]
    if n > len(found):
        raise BadInput(f"--mesh {work.mesh} has {n} devices and {work.topology} {len(found)}")
    return mesh_of(sizes[ROWS], sizes[HEADS], found[:n])


def _placed(arguments: tuple[Any, ...], place: SingleDeviceSharding | None) -> tuple[Any, ...]:
    """The descriptions on that device; on a mesh they have their places already."""
    if place is None:
        return arguments

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(put, arguments, is_leaf=lambda leaf: leaf is None)


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    header = ["work", "weights", "rows", "moved", "least", "ratio", "once a call", "ring copies"]
    header += [
        "scratch",
        "device",
        "fits",
        "FLOP, of the model",
        "collectives",
        "compiled",
        "roofline",
    ]
    return TableText(header, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    of = row.details
    if not of:
        return [row.work, row.dtype, str(row.batch), *[""] * 12]
    kinds = of["collectives"].items()
    return [
        row.work,
        row.dtype,
        str(row.batch),
        cell("{:.2f} GB", of["bytes_moved"], 1e9),
        cell("{:.2f} GB", of["bytes_least"], 1e9),
        f"{of['bytes_moved'] / of['bytes_least']:.2f}",
        cell("{:.2f} GB", of["bytes_per_call"], 1e9),
        str(of["ring_copies"]),
        cell("{:.2f} GB", of["scratch_bytes"], 1e9),
        cell("{:.2f} GB", of["device_bytes"], 1e9),
        "yes" if of["fits"] else "no",
        f"{of['flops']:.3g}, {of['model_flops']:.3g}",
        ", ".join(f"{each['n']} {name}" for name, each in kinds) or "none",
        cell("{:.0f} s", of["lower_s"] + of["compile_s"]),
        cell("{:.2f} ms", of["roofline_s"], 1e-3),
    ]
