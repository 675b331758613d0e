"""Bytes, arithmetic and collectives of a compiled XLA program, counted in its optimised HLO text.

XLA's own `cost_analysis` does not exist for CUDA, and for TPUs it counts a loop once, whatever its
length. So it is counted here: an instruction reads its operands and writes its result, unless
they are kept on the chip (VMEM); a slice reads what it takes, an update in place touches what it
replaces, and what happens within a fusion touches no memory (openxla.org/xla).
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of a number of each type; a token or an opaque value has none.
BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "c64": 64, "c128": 128}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"opt-barrier", "partition-id", "replica-id", "add-dependency"}
TAKEN = {"slice", "dynamic-slice", "gather"}
REPLACED = {"dynamic-update-slice", "scatter"}
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
CALLED = re.compile(r"(calls|body|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
ON_CHIP = re.compile(r"S\([1-9]\d*\)")
WORKSPACE = re.compile(r'custom_call_target="__(?:cublas|cudnn)')


class Array(NamedTuple):
    """An array of a program: its type, its axes, and whether it is kept on the chip."""

    dtype: str
    dims: tuple[int, ...]
    is_on_chip: bool = False

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        bits = BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return math.ceil(self.size * bits / 8)

    @property
    def moved(self) -> int:
        """Bytes of device memory that reading or writing all of it moves."""
        return 0 if self.is_on_chip else self.nbytes


class Instruction(NamedTuple):
    """An instruction: what it makes (the leaves of its tuple), its operation and operands."""

    name: str
    results: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Move(NamedTuple):
    """Bytes of device memory that an instruction moves, and how often it runs."""

    instruction: Instruction
    bytes_each: int
    times: int

    @property
    def bytes(self) -> int:
        """Bytes that it moves in all."""
        return self.bytes_each * self.times

    @property
    def where(self) -> str:
        """The operation of the source that it comes from, as JAX names it; else its own name."""
        found = re.search(r'op_name="([^"]*)"', self.instruction.attributes)
        return found[1] if found else self.instruction.name


class Program:
    """A compiled program, from what `jax.stages.Compiled.as_text` says of it.

    Attributes:
        computations: the instructions of each computation, by its name, in their order.
        entry: name of the computation that is the program.
        trips: how often a loop runs within a step if the compiler does not know.
    """

    def __init__(self, text: str, trips: int = 1) -> None:
        self.trips = trips
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        instructions: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
                instructions = self.computations.setdefault(name, [])
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line.startswith(" ") and (found := _instruction(line)):
                instructions.append(found)
        self._by_name = {
            name: {each.name: each for each in found} for name, found in self.computations.items()
        }
        self._moves = functools.cache(self._moves_of)

    def moves(self, computation: str = "") -> list[Move]:
        """What each instruction of a computation moves, those of its loops and branches too.

        A loop counts as often as it is known to run, or once; of branches the dearest counts.
        """
        return self._moves(computation or self.entry)

    def step(self) -> str:
        """The computation that is a step: the body of the loop which moves the most, or else all.

        Only loops whose number of turns the compiler does not know are loops over steps.
        """
        bodies = [
            body
            for each in self.computations[self.entry]
            if each.op == "while" and not trip_count(each)
            for body in _called(each, "body")
        ]
        return max(bodies, key=lambda body: total(self.moves(body)), default=self.entry)

    def moves_once(self, step: str) -> list[Move]:
        """What a call moves besides its steps."""
        return self._moves_of(self.entry, leaving_out=step)

    def walk(self, computation: str = "") -> Iterator[tuple[Instruction, int, str]]:
        """Every instruction, how often it runs and in which computation; inner ones too."""
        name = computation or self.entry
        for each in self.computations[name]:
            yield each, 1, name
            times = trip_count(each) or self.trips if each.op == "while" else 1
            for inner in (*_called(each, "calls"), *_called(each, "body"), *branches(each)):
                yield from ((other, n * times, where) for other, n, where in self.walk(inner))

    def flops(self, computation: str = "") -> int:
        """Floating-point operations of matrix products; of a kernel, what it tells of itself."""
        return sum(
            times * self._flops(where, each) for each, times, where in self.walk(computation)
        )

    def collectives(self, computation: str = "") -> dict[str, tuple[int, int]]:
        """Number and bytes of the results of each kind of collective."""
        found: dict[str, tuple[int, int]] = {}
        for each, times, _ in self.walk(computation):
            kind = COLLECTIVE.fullmatch(each.op)
            if kind:
                # An asynchronous one has its operands among its results.
                results = each.results[len(each.results) // 2 :] if kind[2] else each.results
                n, size = found.get(kind[1], (0, 0))
                moved = sum(array.nbytes for array in results)
                found[kind[1]] = n + times, size + times * moved
        return found

    def asynchronous(self, computation: str = "") -> tuple[int, int]:
        """How many collectives start early and end late, with work between, and how many do not."""
        early = late = 0
        for name in {computation or self.entry, *self._inner(computation or self.entry)}:
            instructions = self.computations[name]
            for i, each in enumerate(instructions):
                kind = COLLECTIVE.fullmatch(each.op)
                if kind and not kind[2]:
                    late += 1
                elif kind:
                    done = next(j for j, e in enumerate(instructions) if each.name in e.operands)
                    between = instructions[i + 1 : done]
                    is_hidden = any(e.op in ("fusion", "dot", "convolution") for e in between)
                    early, late = early + is_hidden, late + (not is_hidden)
        return early, late

    def copies(self, dims: tuple[int, ...]) -> int:
        """Copies from device memory to device memory of an array with these axes, in any order."""
        sought = sorted(d for d in dims if d > 1)

        def is_copy(each: Instruction) -> bool:
            if each.op != "fusion":
                return each.op in ("copy", "copy-start", "transpose")
            inner = [e.op for name in _called(each, "calls") for e in self.computations[name]]
            return set(inner) <= FREE | {"copy", "transpose"}

        return sum(
            move.bytes_each >= 2 * move.instruction.results[0].nbytes
            and sorted(d for d in move.instruction.results[0].dims if d > 1) == sought
            for move in self.moves()
            if is_copy(move.instruction)
        )

    def _inner(self, computation: str) -> Iterator[str]:
        for each in self.computations[computation]:
            for name in (*_called(each, "body"), *branches(each)):
                yield name
                yield from self._inner(name)

    def _moves_of(self, computation: str, leaving_out: str = "") -> list[Move]:
        found: list[Move] = []
        for each in self.computations[computation]:
            if each.op == "while":
                trips = trip_count(each) or self.trips
                bodies = [body for body in _called(each, "body") if body != leaving_out]
                inner = [move for body in bodies for move in self.moves(body)]
                found += [move._replace(times=trips * move.times) for move in inner]
            elif each.op in ("conditional", "call"):
                of_each = [self.moves(name) for name in branches(each)]
                found += max(of_each, key=total, default=[])
            elif bytes_ := self._bytes(computation, each):
                found.append(Move(each, bytes_, 1))
        return found

    def _arrays(self, computation: str, name: str) -> tuple[Array, ...]:
        made = self._by_name[computation].get(name)
        return made.results if made else ()

    def _bytes(self, computation: str, each: Instruction) -> int:
        """Bytes of device memory that a single instruction moves."""
        if each.op in FREE or each.op.endswith(("-done", "-update")):
            return 0
        operands = [self._arrays(computation, name) for name in each.operands]
        if each.op == "fusion":
            return self._of_fusion(each, operands)
        reads = [sum(array.moved for array in arrays) for arrays in operands]
        writes = sum(array.moved for array in each.results)
        if each.op.removesuffix("-start") in TAKEN:
            made = each.results[-1] if not each.op.endswith("-start") else each.results[-2]
            source = operands[0][0] if operands and operands[0] else made
            return made.nbytes * (not source.is_on_chip) + made.moved
        if each.op in REPLACED:
            new = operands[-1 if each.op == "scatter" else 1]
            return 2 * sum(array.moved for array in new)
        if each.op.endswith("-start"):  # the first of its results is the new one of a copy
            made = each.results[:1] if each.op == "copy-start" else each.results[len(reads) :]
            return sum(reads) + sum(array.moved for array in made)
        if WORKSPACE.search(each.attributes) and len(each.results) > 1:
            writes = sum(array.moved for array in each.results[:-1])
        if (told := _cost_estimate(each)) and "bytes_accessed" in told:
            return int(told["bytes_accessed"])
        return sum(reads) + writes

    def _of_fusion(self, each: Instruction, operands: list[tuple[Array, ...]]) -> int:
        (name,) = _called(each, "calls")
        body = self.computations[name]
        by_name = self._by_name[name]
        read = sum(
            self._read(name, inner.name, sum(array.moved for array in operands[_number(inner)]))
            for inner in body
            if inner.op == "parameter"
        )
        root = next(inner for inner in body if inner.is_root)
        makers = [by_name[o] for o in root.operands] if root.op == "tuple" else [root]
        written = 0
        for result, maker in zip(each.results, makers, strict=False):
            maker = _source(maker, by_name)
            arrays = (result,)
            if maker.op in REPLACED:
                arrays = self._arrays(name, maker.operands[-1 if maker.op == "scatter" else 1])
            written += 0 if result.is_on_chip else sum(array.nbytes for array in arrays)
        return read + written

    def _read(self, computation: str, array: str, whole: int) -> int:
        """Bytes of an operand of a fusion that are read in it, at most the whole."""
        read = 0
        for user in self.computations[computation]:
            places = [i for i, operand in enumerate(user.operands) if operand == array]
            if not places or user.op == "parameter":
                continue
            is_view = user.op == "bitcast" or "output_to_operand_aliasing" in user.attributes
            if is_view and not user.is_root:
                read += self._read(computation, user.name, whole)
            elif user.op in TAKEN and places == [0]:
                read += user.results[0].nbytes
            elif user.op == "fusion":
                (inner,) = _called(user, "calls")
                named = {
                    _number(e): e.name for e in self.computations[inner] if e.op == "parameter"
                }
                read += sum(self._read(inner, named[i], whole) for i in places)
            elif user.op not in REPLACED or places != [0]:
                return whole
        return min(whole, read)

    def _flops(self, computation: str, each: Instruction) -> int:
        if told := _cost_estimate(each):
            return int(told.get("flops", 0))
        made = sum(array.size for array in each.results)
        sizes = [self._arrays(computation, name) for name in each.operands]
        if each.op == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
            summed = [int(i) for i in axes[1].split(",")] if axes and axes[1] else []
            return 2 * made * math.prod(sizes[0][0].dims[i] for i in summed)
        if each.op == "convolution":
            labels = re.search(r"dim_labels=\w+_(\w+)->\w+", each.attributes)
            kernel = sizes[1][0].dims
            assert labels
            if "lhs_dilate" in each.attributes:  # batches of a product in the place of a window
                return 2 * made * kernel[labels[1].index("i")]
            return 2 * made * math.prod(kernel) // kernel[labels[1].index("o")]
        if each.op == "reduce" and sizes:
            maker = self._by_name[computation].get(each.operands[0])
            maker = _source(maker, self._by_name[computation]) if maker else None
            if maker and maker.op == "multiply":
                return 2 * sizes[0][0].size
        return 0


def total(moves: list[Move]) -> int:
    """Bytes of all of them."""
    return sum(move.bytes for move in moves)


def trip_count(loop: Instruction) -> int | None:
    """How often a loop runs, if the compiler knows."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(found[1]) if found else None


def branches(each: Instruction) -> list[str]:
    """The computations of which a conditional runs one, or that a call runs."""
    if each.op == "call":
        return _called(each, "to_apply")
    if each.op != "conditional":
        return []
    listed = BRANCHES.search(each.attributes)
    named = re.findall(r"[\w.\-]+", listed[1]) if listed else BRANCH.findall(each.attributes)
    return list(named)


def _called(each: Instruction, key: str) -> list[str]:
    if key == "to_apply" and each.op != "call":
        return []
    if key == "calls" and each.op != "fusion":
        return []
    return [name for found, name in CALLED.findall(each.attributes) if found == key]


def _source(each: Instruction, by_name: dict[str, Instruction]) -> Instruction:
    """What made an array, before it was only looked at in another way."""
    while each.op in ("bitcast", "reshape", "convert", "copy") and each.operands[0] in by_name:
        each = by_name[each.operands[0]]
    return each


def _number(parameter: Instruction) -> int:
    return int(parameter.operands[0])


def _cost_estimate(each: Instruction) -> dict[str, float] | None:
    """What a Pallas kernel tells of its cost."""
    if each.op != "custom-call" or "cost_estimate" not in each.attributes:
        return None
    found = re.search(r'"cost_estimate":(\{[^}]*\})', each.attributes)
    return {key: float(n) for key, n in json.loads(found[1]).items()} if found else None


def _instruction(line: str) -> Instruction | None:
    r"""Parses a line of a computation.

    >>> made = _instruction("  ROOT %d = bf16[8,4]{1,0:S(1)} dot(%x, %w), lhs_contracting_dims={1}")
    >>> made.results, made.op, made.operands
    ((Array(dtype='bf16', dims=(8, 4), is_on_chip=True),), 'dot', ('x', 'w'))
    """
    found = LINE.match(line)
    if not found:
        return None
    name, rest = found.groups()
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest) if rest.startswith("(") else _first(rest, " ")
    results, rest = _arrays(rest[:end]), rest[end:].lstrip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, attributes = rest[: end - 1], rest[end:]
    operands = (inside,) if op == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, results, op, operands, attributes, line.lstrip().startswith("ROOT "))


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
            bool(layout and ON_CHIP.search(layout)),
        )
        for dtype, dims, layout in ARRAY.findall(shape)
    )


def _closing(text: str) -> int:
    """Place after the bracket that closes the first."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _first(text: str, letter: str) -> int:
    place = text.find(letter)
    return len(text) if place < 0 else place
