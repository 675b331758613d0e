"""Every command that writes a file or a folder asks before its work whether it can."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lechat_jax.errors import BadInput
from lechat_jax.eval import command as eval
from lechat_jax.generate import command as generate
from parity import make_checkpoint, quality
from parity.bench import command as bench
from parity.check import command as check
from parity.convert import command as convert

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], object], list[str]]] = {
    "eval": (eval.main, ["no-model", "--json"]),
    "generate": (generate.main, ["no-model", "--json"]),
    "quality": (quality.main, ["no-model", "--json"]),
    "check json": (check.main, ["--json"]),
    "check junit": (check.main, ["--junit"]),
    "check markdown": (check.main, ["--markdown"]),
    "check html": (check.main, ["--html"]),
    "bench train": (bench.main, ["train", "--minutes", "1", "--plot"]),
    "bench decode": (bench.main, ["decode", "--plot"]),
    "bench attention": (bench.main, ["attention", "--json"]),
}


@pytest.mark.parametrize(("main", "argv"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_asks_before_its_work(
    main: Callable[[Sequence[str]], object], argv: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="is a folder; name a file in it"):
        main([*argv, str(tmp_path)])


@pytest.mark.parametrize(
    ("main", "before", "after"),
    [(convert.main, ["no-model"], ["--to", "hf"]), (make_checkpoint.main, [], [])],
    ids=["convert", "make_checkpoint"],
)
def test_so_does_one_that_makes_a_folder(
    main: Callable[[Sequence[str]], object], before: list[str], after: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="file/model: Not a directory; name another folder"):
        main([*before, str(tmp_path / "file" / "model"), *after])
