"""A command that is printed runs as it stands, whatever a folder is called."""

import dataclasses
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax import shell
from lechat_jax.cli import flags
from lechat_jax.shell import command

NASTY = (
    "with space",
    "it's",
    'a "quote"',
    "-dash",
    "--to",
    "$HOME",
    "`id`",
    "back\\slash",
    "été 日本",
    "a;b&c|d",
    "*",
    "~",
    "#1",
    "[bold]x",
    "new\nline",
    "!!",
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Some flags.

    Attributes:
        folder: A folder.
        prompt: A text.
        resume: Another folder.
    """

    folder: tyro.conf.Positional[Path]
    prompt: str = ""
    resume: Path | None = None


def read(line: str) -> Flags:
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "lechat_jax.x"]
    return flags.parse(Flags, "x", "", words[3:])


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1)


@given(names, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example("-x", "- a list")
@example("--resume", "--resume=x")
def test_a_shell_reads_the_names_that_were_meant(name: str, text: str) -> None:
    found = read(command("lechat_jax.x", Path(name), prompt=text, resume=Path(name)))
    assert (found.folder, found.prompt, found.resume) == (Path(name), text, Path(name))


@pytest.mark.parametrize("name", NASTY)
def test_a_real_shell_does_too(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    line = command("os", Path(name)).replace("python -m os", "ls -d")
    shown = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert Path(shown.stdout.removesuffix("\n")) == Path(name) or "\n" in name


def test_flags_without_a_value_are_left_out() -> None:
    line = command("lechat_jax.x", "org/name", to="lechat", rope_theta=1e6, revision=None)
    assert line == "python -m lechat_jax.x org/name --to lechat --rope-theta 1000000.0"


def test_windows_has_quotes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.os, "name", "nt")
    line = command("lechat_jax.x", "C:\\My models\\7b", to="lechat")
    assert line == 'python -m lechat_jax.x "C:\\My models\\7b" --to lechat'
