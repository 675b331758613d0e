"""gs:// and s3:// in the place of a path, against servers that stand for Google's and Amazon's."""

import dataclasses
import hashlib
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gcsfs", reason="the extra gcs")
pytest.importorskip("s3fs", reason="the extra s3")
pytest.importorskip("gcp_storage_emulator.server", reason="it stands for Google")
pytest.importorskip("moto.server", reason="it stands for Amazon")

import fsspec

import lechat_jax as lechat
from lechat_jax.checkpoint.bucket_run import run_to_resume
from lechat_jax.checkpoint.weights import load_weights, save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.buckets import BucketSync, fetch, working_folder
from lechat_jax.model.binding import weights_of
from lechat_jax.train.command import main as train
from parity.convert.command import main as convert
from tests.support import tokenizers
from tests.support.models import random_model

google_server: Any = importlib.import_module("gcp_storage_emulator.server")
amazon_server: Any = importlib.import_module("moto.server")

READ_DATA = google_server._read_data
SHORT = "--batch 2 --block 16 --max-tokens 4 --eval-tokens 64"


def parts_of_upload(handler: Any, query: Any) -> Any:
    """The body of a request as the emulator reads it, but a file to the last byte.

    gcsfs ends a file by LF and a boundary. The emulator takes a CR at its end for part of that.
    """
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return READ_DATA(handler, query)
    raw = google_server._decode_raw_data(google_server._read_raw_data(handler), handler)
    _, meta, file = raw.split(b"--==0==\n", 2)
    header, _, content = file.partition(b"\n\n")
    return {
        "meta": json.loads(meta.partition(b"\n\n")[2]),
        "content": content.removesuffix(b"\n--==0==--"),
        "content-type": header.decode().partition(": ")[2],
    }


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """What the environment of a process has to say for gs://bucket and s3://bucket to be here."""
    google = google_server.create_server("127.0.0.1", 0, in_memory=True)
    google.start()
    amazon = amazon_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    amazon.start()
    host, port = amazon.get_host_and_port()
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{google._api._httpd.server_address[1]}",
        "NO_GCE_CHECK": "true",  # nobody asks Google whether this is a machine of theirs
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(google_server, "_read_data", parts_of_upload)
        with pytest.MonkeyPatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            for scheme in ("gs", "s3"):
                fs, _ = fsspec.url_to_fs(f"{scheme}://bucket")
                fs.mkdir("bucket")
        yield environment
    google.stop()
    amazon.stop()


@pytest.fixture(params=["gs", "s3"])
def bucket(
    request: pytest.FixtureRequest, servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URI of a folder of this test alone."""
    for name, value in servers.items():
        monkeypatch.setenv(name, value)
    own = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]
    return f"{request.param}://bucket/{own}"


def files_at(uri: str) -> dict[str, bytes]:
    """What is in a bucket below a URI, by name."""
    fs, root = fsspec.url_to_fs(uri, use_listings_cache=False)
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in sorted(fs.find(root))}


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n\n"])
def test_a_file_is_stored_to_its_last_byte(bucket: str, end: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"\0\xff" + end)
    uri = f"{bucket}/{end.hex()}"
    BucketSync(tmp_path / "a", uri).finish()
    assert files_at(uri) == {"file": b"\0\xff" + end}


def test_a_model_is_converted_into_a_bucket_and_loaded_from_it(
    bucket: str, tiny: MistralConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of(random_model(tiny))
    save_weights(tmp_path / "model", tiny, weights, None)
    for to in ("lechat", "hf"):
        assert convert([str(tmp_path / "model"), f"{bucket}/{to}", "--to", to]) == 0
        assert f"{bucket}/{to}: uploaded" in capsys.readouterr().out
        for name, array in lechat.load(f"{bucket}/{to}").weights.items():
            np.testing.assert_array_equal(array, weights[name])
    assert convert([f"{bucket}/hf", str(tmp_path / "back"), "--to", "lechat"]) == 0
    for name, array in load_weights(tmp_path / "back")[1].items():
        np.testing.assert_array_equal(array, weights[name])
    with pytest.raises(BadInput, match=f"^{bucket}/hf exists; name another folder"):
        convert([str(tmp_path / "model"), f"{bucket}/hf", "--to", "hf"])
    with pytest.raises(BadInput, match=f"^{bucket}/nowhere is not there"):
        lechat.load(f"{bucket}/nowhere")


def test_what_is_in_the_cache_is_downloaded_once_and_again_when_it_changed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = fsspec.url_to_fs(bucket)
    for name, content in {"a.txt": b"one", "b/c.txt": b"two"}.items():
        fs.pipe_file(f"{root}/{name}", content)
    here = fetch(bucket)
    assert (here / "b" / "c.txt").read_bytes() == b"two"
    times = {path: path.stat().st_mtime_ns for path in here.rglob("*.txt")}
    fs.pipe_file(f"{root}/a.txt", b"another")
    fs.rm_file(f"{root}/b/c.txt")
    fs.pipe_file(f"{root}/b/d.txt", b"three")
    assert fetch(bucket) == here
    assert (here / "a.txt").read_bytes() == b"another"
    assert sorted(path.name for path in here.rglob("*.txt")) == ["a.txt", "d.txt"]
    assert fetch(f"{bucket}/b/d.txt").read_bytes() == b"three"
    again = {path: path.stat().st_mtime_ns for path in fetch(bucket).rglob("*.txt")}
    assert again[here / "a.txt"] != times[here / "a.txt"]
    assert fetch(bucket) == here
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*.txt")} == again


def test_a_run_in_a_bucket_is_the_run_of_a_folder_and_goes_on_from_there(
    bucket: str, tiny: MistralConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another machine, with nothing in its cache; text and base are in the bucket."""
    config = dataclasses.replace(tiny, vocab_size=300, n_layers=1)
    base = tmp_path / "base"
    save_weights(base, config, weights_of(random_model(config)), tokenizers.taught(tmp_path))
    assert convert([str(base), f"{bucket}/base", "--to", "hf"]) == 0
    text = "".join(f"The square of {i} is {i * i}.\n" for i in range(300))
    (tmp_path / "text.txt").write_text(text)
    fs, root = fsspec.url_to_fs(bucket)
    fs.pipe_file(f"{root}/data/text.txt", text.encode())
    local = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    local += ["--init-from", str(base), *SHORT.split()]
    assert train([*local, "--steps", "2"]) == 0
    assert train(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
    remote = ["--data", f"{bucket}/data", "--out", f"{bucket}/run"]
    remote += ["--init-from", f"{bucket}/base", *SHORT.split()]
    assert train([*remote, "--steps", "2"]) == 0
    with pytest.raises(BadInput, match=f"{bucket}/run holds a run already; .*--resume {bucket}/"):
        train([*remote, "--steps", "2"])
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "elsewhere"))
    assert train(["--resume", f"{bucket}/run", "--steps", "2"]) == 0
    stored = files_at(f"{bucket}/run")
    here = working_folder(f"{bucket}/run")
    assert stored == {
        path.relative_to(here).as_posix(): path.read_bytes()
        for path in here.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "a third"))
    for name, array in lechat.load(f"{bucket}/run").weights.items():
        np.testing.assert_array_equal(array, lechat.load(tmp_path / "run").weights[name])


def test_what_was_not_uploaded_yet_is_not_lost_where_it_was_made(
    bucket: str, tmp_path: Path
) -> None:
    """And what is in the bucket counts elsewhere, or if another run is there now."""
    for folder, steps in ((tmp_path / "uploaded", (2,)), (working_folder(bucket), (2, 4))):
        for step in steps:
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
            (folder / "checkpoints" / str(step) / "SHA256SUMS").write_text(str(step))
        (folder / "config.json").write_text('{"model": {}, "train": {}}')
    BucketSync(tmp_path / "uploaded", bucket).finish()
    run = run_to_resume(Path(bucket))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["2", "4"]
    run.release()
    assert "checkpoints/4/SHA256SUMS" in files_at(bucket)
    (tmp_path / "uploaded" / "config.json").write_text('{"model": {}, "train": {"seed": 1}}')
    fs, root = fsspec.url_to_fs(bucket, use_listings_cache=False)
    fs.rm(root, recursive=True)
    BucketSync(tmp_path / "uploaded", bucket).finish()
    found = [
        path.parent.name for path in run_to_resume(Path(bucket)).checkpoints.glob("*/SHA256SUMS")
    ]
    assert found == ["2"]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs does
def test_a_file_that_is_uploaded_in_parts_is_the_file(bucket: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(12_000_000)
    (tmp_path / "large.bin").write_bytes(content)
    BucketSync(tmp_path, bucket).finish()
    assert files_at(bucket) == {"large.bin": content}


def test_reading_a_run_leaves_the_folder_that_it_is_trained_in(bucket: str, tmp_path: Path) -> None:
    """And no second process of this machine trains, fetches or deletes what another one has."""
    for folder in (tmp_path / "uploaded", working_folder(bucket)):
        folder.mkdir()
        (folder / "config.json").write_text('{"model": {}, "train": {}}')
    (working_folder(bucket) / "not-uploaded-yet").write_text("x")
    BucketSync(tmp_path / "uploaded", bucket).finish()
    assert fetch(bucket) != working_folder(bucket)
    assert (working_folder(bucket) / "not-uploaded-yet").exists()
    holding = "from pathlib import Path; from lechat_jax.checkpoint.run import Run; import sys; "
    holding += "run = Run(Path(sys.argv[1])); run.hold(); print('held', flush=True); input()"
    command = [sys.executable, "-c", holding, str(working_folder(bucket))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match="is being trained by process"):
            run_to_resume(Path(bucket))
        other.communicate(b"\n")
    assert (working_folder(bucket) / "not-uploaded-yet").exists()
    run_to_resume(Path(bucket))
    assert not (working_folder(bucket) / "not-uploaded-yet").exists()


def test_a_bucket_that_is_not_there_is_told_and_not_passed_over(
    bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    nowhere = f"{bucket.partition(':')[0]}://no-such-bucket/run"
    with pytest.raises(BadInput, match=f"{nowhere} .*; everything is in {tmp_path / 'run'}"):
        BucketSync(tmp_path / "run", nowhere).finish()


def test_a_folder_without_its_manifest_is_none_and_the_last_whole_one_stays(
    bucket: str, tmp_path: Path
) -> None:
    """Uploads go in an order in which every moment is a moment to be killed at."""
    run = tmp_path / "run"
    for step in (1, 2):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        for name in ("SHA256SUMS", "data", "meta.json"):
            (run / "checkpoints" / str(step) / name).write_text(f"{name} of {step}")
    (run / "config.json").write_text("{}")
    mirror = BucketSync(run, bucket)
    order = []

    class Recorder:
        def __init__(self, fs: Any) -> None:
            self._fs = fs

        def put_file(self, local: str, remote: str) -> None:
            order.append(("put", remote.rpartition("/")[2]))
            self._fs.put_file(local, remote)

        def rm_file(self, remote: str) -> None:
            order.append(("rm", remote.rpartition("/")[2]))
            self._fs.rm_file(remote)

    from lechat_jax.files import buckets

    opened = buckets._opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "_opened", lambda uri: (Recorder(opened(uri)[0]), opened(uri)[1]))
        mirror.finish()
        names = [name for _, name in order]
        assert names.index("config.json") < names.index("SHA256SUMS")
        assert max(names.index("data"), names.index("meta.json")) < names.index("SHA256SUMS")
        order.clear()
        for path in (run / "checkpoints" / "1").iterdir():
            path.unlink()
        mirror.finish()
        assert order[0] == ("rm", "SHA256SUMS")
        assert {how for how, _ in order} == {"rm"}
        order.clear()
        mirror.finish()
        assert not order
    assert {name.rpartition("/")[0] for name in files_at(bucket)} == {"", "checkpoints/2"}


KILLED = """
import sys, threading, os, signal
from pathlib import Path
from lechat_jax.files import buckets

n, folder, uri = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
opened = buckets._opened

def dying(uri):
    fs, root = opened(uri)
    put, left = fs.put_file, [n]
    def put_file(local, remote):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        put(local, remote)
    fs.put_file = put_file
    return fs, root

buckets._opened = dying
buckets.BucketSync(folder, uri, is_fetched=False).finish()
"""


def test_kill_9_in_the_middle_of_an_upload_loses_nothing(
    bucket: str, tiny: MistralConfig, tmp_path: Path
) -> None:
    """After as many files as you like: what is there is a whole model, or none at all."""
    folder = tmp_path / "model"
    save_weights(folder, tiny, weights_of(random_model(tiny)), None)
    files = sorted(path.name for path in folder.iterdir())
    for n in range(len(files) + 1):
        uri = f"{bucket}/{n}"
        done = subprocess.run([sys.executable, "-c", KILLED, str(n), str(folder), uri], check=False)
        assert done.returncode == (0 if n == len(files) else -signal.SIGKILL)
        if n == len(files):
            assert lechat.load(uri).config == tiny
        else:
            with pytest.raises(BadInput):
                lechat.load(uri)
        BucketSync(folder, uri).finish()
        assert sorted(files_at(uri)) == files
