"""The rules of the house that a machine can check, each proven able to fail.

Every rule maps one source to the violations in it, so the same function judges the
repository and a planted line that breaks the rule.
"""

import ast
import dataclasses
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from lechat_jax.config.layout import KNOWN

ROOT = Path(__file__).parent.parent
PACKAGES = ("lechat_jax", "lechat_torch", "parity")
LETTERS = set("BTSDNKGHUFVELWPMXJQCRZYOdnhfcpm")  # small ones are the vision tower's
STANDARD_LIBRARY_ONLY = {
    *("lechat_jax.config", "lechat_jax.errors", "lechat_jax.shell", "lechat_jax.files.paths"),
    *("lechat_jax.formats.names", "parity.architectures"),
}

# Tests of lechat_jax run where parity is not installed; some then skip, by `pytest.importorskip`.
NEED_PARITY = ("tests.parity", "tests.torch")

LOADED_WHEN_ASKED_FOR = {"lechat_jax", "lechat_jax.model"}  # what they name, not when imported

# The law: what each folder of a package, or file beside the folders, may import of the same
# package. From the ground up, so that no arrow goes up; two words with a dot are one file.
ANYONE = {"errors", "shell"}
STORED = "config devices files formats model quantize tokenizer"
MAY_IMPORT = {
    "lechat_jax": {
        "__main__": "cli",
        "errors": "",
        "shell": "",
        "files": "",
        "config": "",
        "ops": "config devices.platform",
        "devices": "config files",
        "cli": "devices files",
        "tokenizer": "config files",
        "quantize": "config",
        "formats": "config files quantize tokenizer",
        "data": "config files tokenizer",
        "model": "config devices ops data.rows",
        "checkpoint": f"{STORED} ops",
        "generate": f"{STORED} checkpoint ops cli data.rows",
        "eval": f"{STORED} checkpoint ops cli data generate",
        "embed": f"{STORED} checkpoint ops cli data",
        "report": "config files checkpoint cli",
        "chat": f"{STORED} checkpoint ops cli generate",
        "serve": f"{STORED} checkpoint ops cli generate",
        "train": f"{STORED} checkpoint ops cli data generate eval",
    },
    "parity": {
        "measure": "",
        "report": "",
        "held_out": "",
        "architectures": "",
        "random_models": "architectures",
        "convert": "",
        "make_checkpoint": "convert",
        "drawings": "",
        "push": "convert",
        "quality": "held_out measure report",
        "peers": "convert measure",
        "check": "architectures convert measure peers random_models",
        "bench": "architectures convert make_checkpoint measure peers random_models report",
    },
}
# What still breaks it, and has to go: a module and what it imports. This list only shrinks.
EXCEPTIONS: set[tuple[str, str]] = set()

# Words that no public name may contain, since the field has one that people search for: dataset
# for lessons, prefill for reading, schedule for timetable, zero for nought.
RIDDLES = {
    *("lesson", "lessons", "beginning", "mirror", "mirrors", "apart", "child", "fresh"),
    *("timetable", "reading", "projection", "turn", "turns", "told", "said", "asked", "made"),
    *("found", "exam", "trial", "lively", "against", "pairs", "halves", "whole", "nought"),
}
# Names that do, with the word: flags and JSON keys that people's scripts have, and a file whose
# name says it best. This list only shrinks.
STILL_RIDDLES: dict[str, str] = {
    "parity.bench.moe.Moe.turns": "turns",
    "parity.bench.train.Train.apart": "apart",
    "parity.check.options.CheckConfig.against": "against",
    "parity.check.verdict.Fault.found_stage": "found",
    "parity.check.verdict.FaultReport.all_found": "found",
    "parity.check.whole_model": "whole",
    "parity.quality.Quality.against": "against",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One module: its dotted name and its text."""

    module: str
    text: str

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


Rule = Callable[[Source], list[str]]


def sources() -> Iterator[Source]:
    for folder in (*PACKAGES, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            yield Source(".".join(parts), path.read_text(encoding="utf-8"))


def imports(source: Source) -> Iterator[str]:
    """Every name that is imported, anywhere in the file and also by a call."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).split(".")[-1]
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield str(target.value)


def imports_only_what_the_house_allows(source: Source) -> list[str]:
    def allowed(target: str) -> bool:
        top = target.split(".")[0]
        if not top:  # a relative import hides what it imports from the reader
            return False
        if source.module in STANDARD_LIBRARY_ONLY:
            ours = any(target.startswith(module) for module in STANDARD_LIBRARY_ONLY)
            return ours or top in sys.stdlib_module_names
        if source.package == "tests":
            return top not in ("parity", "lechat_torch") or source.module.startswith(NEED_PARITY)
        if top == "tests" or (top == "parity" and source.package != "parity"):
            return False
        if source.package == "lechat_jax":
            return top not in ("torch", "transformers", "xformers", "lechat_torch")
        if source.package == "lechat_torch":
            numbers = target.startswith(("lechat_jax.config", "lechat_jax.errors"))
            return numbers or top not in ("jax", "flax", "lechat_jax")
        return True

    return [f"imports {target}" for target in imports(source) if not allowed(target)]


def broken_laws(source: Source) -> set[tuple[str, str]]:
    """The module, and what of its own package it imports against the law."""
    law = MAY_IMPORT.get(source.package, {})
    module, *rest = source.module.split(".")
    if not rest or not law:
        return set()
    allowed = ANYONE | {rest[0]} | set(law.get(rest[0], "").split())
    targets = (name.split(".")[1:] for name in imports(source) if name.startswith(f"{module}."))
    reached = {(target[0], ".".join(target[:2])) for target in targets}
    return {(source.module, file) for room, file in reached if not {room, file} & allowed}


def keeps_to_the_law(source: Source) -> list[str]:
    return [f"may not import {target}" for _, target in broken_laws(source) - EXCEPTIONS]


def suppresses_no_checker(source: Source) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
    silencer = re.compile(r"type:\s*ignore|noqa|pyright:|mypy:|pylint:|fmt:\s*(off|skip)")
    return [comment for comment in comments if silencer.search(comment)]


def writes_dimensions_in_the_house_letters(source: Source) -> list[str]:
    """Judges einsum equations wherever they stand, and the shapes of jaxtyping."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[A-Za-z, ]*->[A-Za-z ]*", equation := node.value):
                words = equation.replace("->", " ").replace(",", " ").split()
                is_einsum = "," in equation or " " not in equation
                found += [equation] if is_einsum and set("".join(words)) - LETTERS else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "einsum":
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and "->" not in str(argument.value):
                    found.append(f"{argument.value!r} does not name its result")
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            shape = node.slice.elts[-1]
            if ast.unparse(node.value) in ("Float", "Int", "Bool", "UInt", "Num", "Shaped", "Key"):
                words = re.findall(r"[A-Za-z_]+", str(getattr(shape, "value", "")))
                found += [word for word in words if len(word) == 1 and word not in LETTERS]
    return found


# What cuts a text or asks for a part of it, and the words and constants of a weight's name.
CUTS = {"endswith", "startswith", "removesuffix", "removeprefix", "rpartition"}
WORDS = {word for name in KNOWN for word in name.split(".") if len(word) > 1}
ENDS = {"SCALE", "ZERO", "ORDER", "LORA_A", "LORA_B", "LORA_SCALE"}
# Whose regular expressions have such words too, and are of the keys of another program's files.
PATTERNS_OF_OTHERS = {
    "lechat_jax.devices.memory": "the shared memory of CUDA's kernels",
    "lechat_jax.checkpoint.peft": "PEFT's lora_A and lora_B",
    "lechat_jax.formats.configs.vision": "the language model in Mistral3ForConditionalGeneration",
    "lechat_jax.formats.fused_experts": "the experts of Mistral 4 in Hugging Face's files",
    "parity.convert.first_mixtral": "the gate of Mixtral's first release",
}


def leaves_names_of_weights_to_the_table(source: Source) -> list[str]:
    """No decision by an end, a beginning or another part of a weight's name, but in `layout`.

    Tests may: they are to know by themselves what a name means.
    """
    if source.package == "tests" or source.module == "lechat_jax.config.layout":
        return []
    tree = source.tree
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def is_of_a_name(text: ast.expr) -> bool:
        for node in ast.walk(text):
            match node:
                case ast.Constant(value=str(value)) if value not in KNOWN:
                    if WORDS & {word.strip("_") for word in re.findall(r"[a-z_]+", value)}:
                        return True
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    known = constants.get(name)
                    if name in ENDS or (known and known is not text and is_of_a_name(known)):
                        return True
        return False

    def decides_by(node: ast.AST) -> list[ast.expr]:
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re")), args=[pattern, *_]):
                return [] if source.module in PATTERNS_OF_OTHERS else [pattern]
            case ast.Call(func=ast.Attribute(attr=cut), args=args) if cut in CUTS:
                return args
            case ast.Compare(left=ast.Constant() | ast.JoinedStr() as left, ops=ops):
                return [left] if any(isinstance(op, ast.In | ast.NotIn) for op in ops) else []
        return []

    nodes = (node for node in ast.walk(tree) if any(map(is_of_a_name, decides_by(node))))
    return [f"takes a weight's name apart: {ast.unparse(node)}" for node in nodes]


def public(node: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The public classes, functions and methods, without those inside functions."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def is_overload(node: ast.AST) -> bool:
    """Whether this is one of the types of a function that is described once."""
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(one, ast.Name) and one.id == "overload" for one in decorators)


def describes_what_is_public(source: Source) -> list[str]:
    """Docstrings, and types of every argument and result; tests speak by their names."""
    if source.package == "tests":
        return []
    found = [] if ast.get_docstring(source.tree) else ["the module has no docstring"]
    for node in public(source.tree):
        if not ast.get_docstring(node) and not is_overload(node):
            found.append(f"{node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            bare = [x.arg for x in arguments if not x.annotation and x.arg not in ("self", "cls")]
            found += [f"{node.name} has no type for {name}" for name in bare]
            found += [] if node.returns else [f"{node.name} has no type for its result"]
    return found


def riddles(source: Source) -> dict[str, str]:
    """The public names of a module with a word of `RIDDLES`, its own included.

    Those are of classes, functions, methods and fields of dataclasses, so of flags as well.
    """

    def names(node: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(node, ast.ClassDef):
                yield f"{path}.{ast.unparse(each.target)}"
            elif isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name[0] != "_":
                yield f"{path}.{each.name}"
                if isinstance(each, ast.ClassDef):
                    yield from names(each, f"{path}.{each.name}")

    if source.package not in MAY_IMPORT:
        return {}
    found = {}
    for path in (source.module, *names(source.tree, source.module)):
        name = path.split(".")[-1]
        words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
        if name[0] != "_" and (bad := words & RIDDLES):
            found[path] = min(bad)
    return found


def names_by_the_words_of_the_field(source: Source) -> list[str]:
    new = riddles(source).items() - STILL_RIDDLES.items()
    return [f"{path} contains {word!r}" for path, word in sorted(new)]


RULES: tuple[Rule, ...] = (
    imports_only_what_the_house_allows,
    keeps_to_the_law,
    suppresses_no_checker,
    writes_dimensions_in_the_house_letters,
    leaves_names_of_weights_to_the_table,
    describes_what_is_public,
    names_by_the_words_of_the_field,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    violations = [f"{source.module}: {what}" for source in sources() for what in rule(source)]
    assert not violations, "\n".join(violations)


PLANTED = [
    (keeps_to_the_law, "lechat_jax.model.cache", "from lechat_jax.train.step import score"),
    (keeps_to_the_law, "lechat_jax.model.cache", "import lechat_jax.checkpoint.run"),
    (keeps_to_the_law, "lechat_jax.model.mask", "from lechat_jax.data.tokens import Tokens"),
    (keeps_to_the_law, "lechat_jax.checkpoint.run", "from lechat_jax.cli import flags"),
    (keeps_to_the_law, "lechat_jax.new", "from lechat_jax.config import MistralConfig"),
    (keeps_to_the_law, "parity.convert.write", "def f():\n    from parity.check import run"),
    (imports_only_what_the_house_allows, "lechat_jax.model", "import torch"),
    (imports_only_what_the_house_allows, "lechat_jax.model", "def f():\n    import torch.nn"),
    (imports_only_what_the_house_allows, "lechat_jax.model", "from transformers import AutoModel"),
    (imports_only_what_the_house_allows, "lechat_jax.model", "import xformers.ops as xops"),
    (imports_only_what_the_house_allows, "lechat_jax.train", "from parity.bench import peer"),
    (imports_only_what_the_house_allows, "lechat_jax.train", "from lechat_torch import model"),
    (imports_only_what_the_house_allows, "lechat_jax.train", "importlib.import_module('torch')"),
    (imports_only_what_the_house_allows, "lechat_jax.data", "import tests.test_data"),
    (imports_only_what_the_house_allows, "lechat_jax.data", "from .. import tests"),
    (imports_only_what_the_house_allows, "lechat_torch.model", "from lechat_jax import rope"),
    (imports_only_what_the_house_allows, "lechat_torch.model", "import lechat_jax.rope"),
    (imports_only_what_the_house_allows, "lechat_torch.model", "import jax.numpy as jnp"),
    (imports_only_what_the_house_allows, "parity.bench", "from tests.test_model import tiny"),
    (imports_only_what_the_house_allows, "tests.model.test_moe", "from parity import measure"),
    (imports_only_what_the_house_allows, "tests.chat.test_chat", "from lechat_torch import model"),
    (imports_only_what_the_house_allows, "lechat_jax.config", "import numpy"),
    (imports_only_what_the_house_allows, "lechat_jax.config", "from lechat_jax.rope import turn"),
    (imports_only_what_the_house_allows, "lechat_jax.errors", "import jax"),
    (suppresses_no_checker, "lechat_jax.model", "x = 1  # type: ignore"),
    (suppresses_no_checker, "lechat_jax.model", "x = 1  # type:ignore[assignment]"),
    (suppresses_no_checker, "tests.test_model", "import os  # noqa: F401"),
    (suppresses_no_checker, "parity.bench", "# pyright: basic\nx = 1"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "einsum('btd,fd->btf', x, y)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "jnp.einsum('BTI, ID->BTD', x)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "Linear('BTD,NHI->BTNH')"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "jnp.einsum('BT,TD', x, y)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "x: Float[Array, 'B I D']"),
    *(
        (leaves_names_of_weights_to_the_table, "lechat_jax.train.step", line)
        for line in (
            "name.endswith('kernel')",
            "name.endswith(('.scale', '_norm'))",
            "name.endswith(layout.LORA_A)",
            "name.removesuffix(SCALE)",
            "name.startswith('blocks.')",
            "name.rpartition('.experts.')",
            "END = f'{x}.kernel'\nname.removesuffix(END)",
            "'.experts.' in name",
            "f'{layer}.attn' not in name",
            "re.fullmatch(r'blocks\\.(\\d+)\\.(.+)', name)",
            "KEY = re.compile('attn_norm|mlp_norm')",
        )
    ),
    (leaves_names_of_weights_to_the_table, "lechat_jax.checkpoint.peft", "x.endswith('lora.a')"),
    (describes_what_is_public, "lechat_jax.model", "x = 1"),
    (describes_what_is_public, "lechat_jax.model", "'''Doc.'''\nclass Block: pass"),
    (describes_what_is_public, "parity.bench", "'''Doc.'''\ndef f() -> None: pass"),
    (describes_what_is_public, "parity.bench", "'''Doc.'''\ndef f(x) -> int:\n    '''Doc.'''"),
    (describes_what_is_public, "parity.bench", "'''Doc.'''\ndef f(x: int):\n    '''Doc.'''"),
    (
        describes_what_is_public,
        "lechat_jax.model",
        "'''Doc.'''\nclass Block:\n    '''Doc.'''\n    def f(self) -> None: pass",
    ),
    (names_by_the_words_of_the_field, "lechat_jax.model.projection", "x = 1"),
    (names_by_the_words_of_the_field, "parity.bench", "class TextLessons: pass"),
    (names_by_the_words_of_the_field, "parity.bench", "def write_whole(): pass"),
    (names_by_the_words_of_the_field, "parity.bench", "class A:\n    def told(self): pass"),
    (names_by_the_words_of_the_field, "parity.bench", "class A:\n    all_found: bool = True"),
]


@pytest.mark.parametrize(("rule", "module", "text"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


def test_no_exception_from_the_law_outlives_its_cause() -> None:
    assert set().union(*map(broken_laws, sources())) == EXCEPTIONS


def test_no_name_stands_among_the_riddles_that_is_none_any_more() -> None:
    still = {path: word for source in sources() for path, word in riddles(source).items()}
    assert STILL_RIDDLES.items() <= still.items()


def test_no_pattern_of_others_is_excused_without_need() -> None:
    excused = {source.module: source for source in sources() if source.module in PATTERNS_OF_OTHERS}
    for source in excused.values():
        moved = dataclasses.replace(source, module="elsewhere")
        assert leaves_names_of_weights_to_the_table(moved), source.module
    assert excused.keys() == PATTERNS_OF_OTHERS.keys()


def test_every_room_has_a_law() -> None:
    for package, law in MAY_IMPORT.items():
        rooms = {path.stem for path in (ROOT / package).iterdir() if path.suffix in ("", ".py")}
        assert rooms - {"__init__", "__pycache__"} == set(law)


INNOCENT = """'''Prose with a -> b and text -> tokens; # noqa in a string is no comment.'''
import torchvision
from lechat_jax.config import MistralConfig
from lechat_jax.model import mask
arrow = "text -> tokens"
weights["norm.scale"], "embed.kernel.scale" in weights, name + ".kernel" in weights
is_config = path.name.endswith("config.json") and "n_experts" in fields
scores = einsum("BTKGH,BSKH->BKGTS", q, k)
def f(x: Float[Array, "*B T 3"], y: Int[Array, ""]) -> None:
    '''Doc.'''
    told = _asked(Returns, foundation)
    def inner(a, b): ...
def _private(a): ...
"""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_merely_resembles_a_violation_is_let_pass(rule: Rule) -> None:
    assert rule(Source("lechat_jax.model", INNOCENT)) == []


def test_the_rules_judge_what_is_there() -> None:
    judged = {source.module for source in sources()}
    assert judged >= {"lechat_jax", "lechat_jax.config.mistral", "tests.test_architecture"}


def order_of_import(modules: Iterable[Source]) -> list[str]:
    """Each module after all that it imports, or a `CycleError` that names the circle."""
    modules = list(modules)
    known = {source.module for source in modules}
    graph: dict[str, set[str]] = {}
    for source in modules:
        # `from lechat_jax.model import mask` is the file, not the name, where there is one.
        ends = ((name, name.rpartition(".")[0]) for name in imports(source))
        files = (next((end for end in pair if end in known), None) for pair in ends)
        graph[source.module] = {file for file in files if file and file != source.module}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_imports_never_go_in_a_circle() -> None:
    order = order_of_import(
        source
        for source in sources()
        if source.package in PACKAGES and source.module not in LOADED_WHEN_ASKED_FOR
    )
    assert order.index("lechat_jax.config.mistral") < order.index("lechat_jax.model.mistral")


def test_a_planted_circle_is_found() -> None:
    circle = [
        Source("lechat_jax.model.rope", "from lechat_jax.model.mistral import Mistral"),
        Source("lechat_jax.model.mistral", "def late():\n    from lechat_jax.model import rope"),
    ]
    with pytest.raises(graphlib.CycleError, match="rope"):
        order_of_import(circle)


@pytest.mark.parametrize("module", ["lechat_jax", "lechat_jax.config", "lechat_jax.errors"])
def test_a_config_is_read_without_loading_jax(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{'jax', 'flax', 'numpy'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr
