"""The rows of Parquet files are records like any other."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lechat_jax.data import sources
from lechat_jax.data.sources import load_texts
from lechat_jax.errors import BadInput


def test_the_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "id": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_texts(str(tmp_path / "a.parquet")).documents == ["one", "two"]


def test_columns_that_nobody_needs_are_not_read(tmp_path: Path) -> None:
    far = pa.array([2**62, 0], pa.timestamp("us"))  # which Python has no date for
    pq.write_table(pa.table({"text": ["one", "two"], "when": far}), tmp_path / "a.parquet")
    assert sources.form_of(str(tmp_path / "a.parquet")) is None
    assert load_texts(str(tmp_path / "a.parquet")).documents == ["one", "two"]


def test_parquet_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"story": ["x"]}), file)
    with pytest.raises(BadInput, match=r"row 0, holds neither an example nor a text: .* story"):
        load_texts(str(file))
    pq.write_table(pa.table({"text": ["x", None]}), file)
    with pytest.raises(BadInput, match=r"a\.parquet, row 1, has no text in its `text` field"):
        load_texts(str(file))
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff"]).view(pa.string())}), file)
    with pytest.raises(BadInput, match=r"a\.parquet holds a value that cannot be read"):
        load_texts(str(file))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInput, match="is no Parquet file, or not whole"):
        load_texts(str(file))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"a\.parquet needs a library to be read: pip install pyarr"):
        load_texts(str(tmp_path / "a.parquet"))
