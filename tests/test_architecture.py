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

ROOT = Path(__file__).parent.parent
PACKAGES = ("lechat_jax", "lechat_torch", "parity")
LETTERS = set("BTSDNKGHFVELW")
STANDARD_LIBRARY_ONLY = {
    *("lechat_jax.config", "lechat_jax.releases", "lechat_jax.errors", "lechat_jax.paths"),
    *("parity.names", "parity.architectures"),
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
            return True
        if top == "tests" or (top == "parity" and source.package != "parity"):
            return False
        if source.package == "lechat_jax":
            return top not in ("torch", "transformers", "xformers", "lechat_torch")
        if source.package == "lechat_torch":
            numbers = target.startswith(("lechat_jax.config", "lechat_jax.errors"))
            return numbers or top not in ("jax", "flax", "lechat_jax")
        return True

    return [f"imports {target}" for target in imports(source) if not allowed(target)]


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


def public(node: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The public classes, functions and methods, without those inside functions."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def describes_what_is_public(source: Source) -> list[str]:
    """Docstrings, and types of every argument and result; tests speak by their names."""
    if source.package == "tests":
        return []
    found = [] if ast.get_docstring(source.tree) else ["the module has no docstring"]
    for node in public(source.tree):
        if not ast.get_docstring(node):
            found.append(f"{node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            bare = [x.arg for x in arguments if not x.annotation and x.arg not in ("self", "cls")]
            found += [f"{node.name} has no type for {name}" for name in bare]
            found += [] if node.returns else [f"{node.name} has no type for its result"]
    return found


RULES: tuple[Rule, ...] = (
    imports_only_what_the_house_allows,
    suppresses_no_checker,
    writes_dimensions_in_the_house_letters,
    describes_what_is_public,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    violations = [f"{source.module}: {what}" for source in sources() for what in rule(source)]
    assert not violations, "\n".join(violations)


PLANTED = [
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
    (imports_only_what_the_house_allows, "lechat_jax.config", "import numpy"),
    (imports_only_what_the_house_allows, "lechat_jax.config", "from lechat_jax.rope import turn"),
    (imports_only_what_the_house_allows, "lechat_jax.errors", "import jax"),
    (suppresses_no_checker, "lechat_jax.model", "x = 1  # type: ignore"),
    (suppresses_no_checker, "lechat_jax.model", "x = 1  # type:ignore[assignment]"),
    (suppresses_no_checker, "tests.test_model", "import os  # noqa: F401"),
    (suppresses_no_checker, "parity.bench", "# pyright: basic\nx = 1"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "einsum('btd,fd->btf', x, y)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "jnp.einsum('BTQ, QD->BTD', x)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "Linear('BTD,NHZ->BTNH')"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "jnp.einsum('BT,TD', x, y)"),
    (writes_dimensions_in_the_house_letters, "lechat_jax.model", "x: Float[Array, 'B Q D']"),
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
]


@pytest.mark.parametrize(("rule", "module", "text"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


INNOCENT = """'''Prose with a -> b and text -> tokens; # noqa in a string is no comment.'''
import torchvision
from lechat_jax.config import MistralConfig
from lechat_jax import mask
arrow = "text -> tokens"
scores = einsum("BTKGH,BSKH->BKGTS", q, k)
def f(x: Float[Array, "*B T 3"], y: Int[Array, ""]) -> None:
    '''Doc.'''
    def inner(a, b): ...
def _private(a): ...
"""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_merely_resembles_a_violation_is_let_pass(rule: Rule) -> None:
    assert rule(Source("lechat_jax.model", INNOCENT)) == []


def test_the_rules_judge_what_is_there() -> None:
    judged = {source.module for source in sources()}
    assert judged >= {"lechat_jax", "lechat_jax.config", "parity.bench", "tests.test_architecture"}


def order_of_import(modules: Iterable[Source]) -> list[str]:
    """Each module after all that it imports, or a `CycleError` that names the circle."""
    names = {source.module: set(imports(source)) for source in modules}
    prefixes = {m: {".".join(n.split(".")[:2]) for n in targets} for m, targets in names.items()}
    return list(graphlib.TopologicalSorter(prefixes).static_order())


def test_imports_never_go_in_a_circle() -> None:
    order = order_of_import(source for source in sources() if source.package in PACKAGES)
    assert order.index("lechat_jax.config") < order.index("lechat_jax.model")


def test_a_planted_circle_is_found() -> None:
    circle = [
        Source("lechat_jax.rope", "from lechat_jax.model import Mistral"),
        Source("lechat_jax.model", "def late():\n    from lechat_jax import rope"),
    ]
    with pytest.raises(graphlib.CycleError, match="rope"):
        order_of_import(circle)


@pytest.mark.parametrize("module", ["lechat_jax", "lechat_jax.config", "lechat_jax.errors"])
def test_a_config_is_read_without_loading_jax(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({{'jax', 'flax', 'numpy'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr
