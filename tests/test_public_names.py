"""What `import lechat_jax as lechat` gives, and the command `lechat`."""

import importlib.metadata
import subprocess
import sys

import pytest

import lechat_jax as lechat
from lechat_jax import __main__ as console


@pytest.mark.parametrize("name", lechat.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(lechat)
    assert getattr(lechat, name)


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match="module 'lechat_jax' has no attribute 'Mixtral'"):
        lechat.__getattr__("Mixtral")


def test_the_version_is_the_packages() -> None:
    assert importlib.metadata.version("lechat-jax") == lechat.__version__


@pytest.mark.parametrize(
    ("name", "absent"),
    [("MistralConfig", ["jax", "numpy"]), ("preset", ["jax"]), ("BadInput", ["jax", "numpy"])],
)
def test_a_name_loads_only_what_it_needs(name: str, absent: list[str]) -> None:
    code = f"import sys, lechat_jax; lechat_jax.{name}; print(*sys.modules.keys() & {set(absent)})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("verb", console.VERBS)
def test_every_verb_is_a_command(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(console.VERBS[verb][0].partition(".")[0])
    monkeypatch.setattr(sys, "argv", ["lechat", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == 0
    assert f"usage: lechat {verb} " in capsys.readouterr().out


def test_without_a_verb_the_verbs_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lechat"])
    console.main()
    told = capsys.readouterr().out
    assert [verb for verb in console.VERBS if f"  {verb} " not in told] == []


def test_an_unknown_verb_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lechat", "serv"])
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == 2
    assert "convert, push, check, bench, quality, not 'serv'" in capsys.readouterr().err
