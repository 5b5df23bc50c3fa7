"""Object storage on bad days: the same results as on good ones, or an error that names the object, and never a wait for ever."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support import faults
from tests.support.s3 import BUCKET, ObjectStore, object_store

from unclip.data.manifest import read_slices, scan
from unclip.data.sources.webdataset import WebDatasetSourceConfig
from unclip.utils import s3, storage

MANY = 1000
"""More disturbances of a request than any client bears."""


@pytest.fixture(scope="module")
def running_store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, request) -> ObjectStore:
    """A folder of its own for each test; pauses are short."""
    monkeypatch.setattr(s3, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_S", 0.05)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return ObjectStore(f"{running_store.uri}/{name}", running_store.proxy, running_store.server_url)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def direct(store: ObjectStore):
    """Another client, past the proxy."""
    return boto3.client("s3", endpoint_url=store.server_url)


@pytest.mark.parametrize("kind", faults.PASSING)
def test_every_operation_gets_over_every_fault(store: ObjectStore, kind: str) -> None:
    uri, small, large = store.uri, content(3000), content(300_000)
    with store.proxy.faults(kinds=(kind,), most=2) as plan:
        storage.check_writable(uri)
        storage.write_bytes(f"{uri}/a/small", small)
        with storage.local_target(f"{uri}/a/large") as path:
            path.write_bytes(large)
        storage.append_line(f"{uri}/log", "one")
        storage.append_line(f"{uri}/log", "two")
        assert storage.read_bytes(f"{uri}/a/small") == small
        with storage.local_file(f"{uri}/a/large") as path:
            assert path.read_bytes() == large
        fs, inside = storage.filesystem(f"{uri}/a/large")
        with fs.open(inside, "rb") as stream:
            stream.seek(1000)
            assert stream.read(5000) == large[1000:6000]
        assert storage.read_lines(f"{uri}/log") == ["one", "two"]
        assert storage.names(uri) == ["a", "log"]
        assert (storage.size(f"{uri}/a/small"), storage.size(f"{uri}/a")) == (3000, None)
        storage.remove(f"{uri}/a")
        assert not storage.exists(f"{uri}/a")
        assert storage.exists(f"{uri}/log")
    assert plan.injected[kind] >= 2 * 10
    assert {request.split()[0] for request in plan.requests} == {"GET", "PUT", "POST", "HEAD"}


def test_records_read_through_faults_are_the_same(store: ObjectStore) -> None:
    for number in range(6):
        table = pa.table({"id": np.arange(50) + 50 * number, "image": pa.array([content(2000 + i) for i in range(50)])})
        with storage.local_target(f"{store.uri}/{number}.parquet") as path:
            pq.write_table(table, path, row_group_size=20)

    def read() -> pa.Table:
        manifest = scan(store.uri, ("id", "image"))
        assert manifest.rows == 300
        slices = [(index, 1, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
        return read_slices(manifest, slices[::-1], ["image", "id"])

    undisturbed = read()
    with store.proxy.faults(seed=1, rate=0.6, most=3) as plan:
        assert read().equals(undisturbed)
    assert len(plan.injected) > 4


def test_tars_read_through_faults_are_the_same(store: ObjectStore) -> None:
    for number in range(3):
        with storage.local_target(f"{store.uri}/{number:05d}.tar") as path, tarfile.open(path, "w") as archive:
            for row in range(20):
                for suffix, part in (("jpg", content(30_000 + row)), ("txt", f"caption {number} {row}".encode())):
                    member = tarfile.TarInfo(f"{number:04d}{row:04d}.{suffix}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))

    def read() -> list[pa.Table]:
        source = WebDatasetSourceConfig(uri=store.uri).build()
        return [table for part in source.parts() for table in source.read(part)]

    undisturbed = read()
    assert sum(table.num_rows for table in undisturbed) == 60
    assert all(table["reason"].null_count == table.num_rows for table in undisturbed)
    with store.proxy.faults(seed=2, most=3) as plan:
        assert all(table.equals(expected) for table, expected in zip(read(), undisturbed, strict=True))
    assert len(plan.injected) > 4
    tar = {"kinds": (faults.CUT_BODY,), "methods": ("GET",), "containing": ".tar", "most": MANY}
    with store.proxy.faults(**tar), pytest.raises(OSError, match=rf"{store.uri}/00000.tar: .*8 attempts"):
        read()  # not the good rows and then a `truncated_shard`


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as the protocol has them, and downloads of a few turns of a few ranges."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "RANGE_BYTES", 2**20)
    monkeypatch.setattr(s3, "RANGES_AT_ONCE", 3)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [0, 1, 2**20, 11 * 2**20 + 1])
def test_large_files_through_faults(store: ObjectStore, size: int) -> None:
    expected = content(size)
    with store.proxy.faults(seed=size, most=2) as plan:
        with storage.local_target(f"{store.uri}/file") as path:
            path.write_bytes(expected)
        with storage.local_file(f"{store.uri}/file") as path:
            assert path.read_bytes() == expected
    assert sum(plan.injected.values()) > 0
    assert ("uploadId" in " ".join(plan.requests)) == (size > 10 * 2**20)


@pytest.mark.usefixtures("small_parts")
def test_an_upload_whose_completion_is_not_heard_of_is_there_all_the_same(store: ObjectStore) -> None:
    expected = content(11 * 2**20)
    lost = {"kinds": (faults.RESET_AFTER,), "methods": ("POST",), "containing": "uploadId"}
    with store.proxy.faults(**lost) as plan, storage.local_target(f"{store.uri}/file") as path:
        path.write_bytes(expected)
    assert plan.injected[faults.RESET_AFTER] >= 1
    assert storage.read_bytes(f"{store.uri}/file") == expected


@pytest.mark.usefixtures("small_parts")
def test_an_upload_that_fails_leaves_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")

    def upload() -> None:
        with storage.local_target(f"{store.uri}/file") as path:
            path.write_bytes(content(11 * 2**20))

    refused = {"kinds": (faults.INTERNAL_ERROR,), "methods": ("PUT",), "containing": "partNumber=2", "most": MANY}
    message = rf"{store.uri}/file: UploadPart: InternalError: .*2 attempts"
    with store.proxy.faults(**refused), pytest.raises(OSError, match=message):
        upload()
    assert storage.names(store.uri) == []
    assert "Uploads" not in direct(store).list_multipart_uploads(Bucket=BUCKET)


def read_range(uri: str) -> bytes:
    fs, path = storage.filesystem(uri)
    return fs.cat_file(path, start=100, end=200)


@pytest.mark.parametrize(
    ("kind", "read"), [(faults.FLIPPED_BODY, storage.read_bytes), (faults.RANGE_IGNORED, read_range)]
)
def test_wrong_content_is_asked_for_again(store: ObjectStore, kind: str, read: Callable[[str], bytes]) -> None:
    storage.write_bytes(f"{store.uri}/file", content(1000))
    expected = read(f"{store.uri}/file")
    with store.proxy.faults(kinds=(kind,)) as plan:
        assert read(f"{store.uri}/file") == expected
    assert plan.injected[kind] == 1


def test_a_file_replaced_while_it_is_read_is_an_error(store: ObjectStore) -> None:
    storage.write_bytes(f"{store.uri}/file", content(1000))
    fs, path = storage.filesystem(f"{store.uri}/file")
    with fs.open(path, "rb", block_size=100, cache_type="none") as stream:
        stream.read(100)
        storage.write_bytes(f"{store.uri}/file", content(1001))
        with pytest.raises(OSError, match=rf"{path}.*no longer exists"):
            stream.read(100)


def test_deletions_refused_inside_a_success_are_repeated(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{store.uri}/a/b", b"x")
    with store.proxy.faults(kinds=(faults.KEYS_REFUSED,), methods=("POST",)):
        storage.remove(f"{store.uri}/a")
    assert storage.names(store.uri) == []
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.write_bytes(f"{store.uri}/a/b", b"x")
    refused = {"kinds": (faults.KEYS_REFUSED,), "methods": ("POST",), "most": MANY}
    with store.proxy.faults(**refused), pytest.raises(OSError, match=r"DeleteObjects: InternalError"):
        storage.remove(f"{store.uri}/a")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (faults.INTERNAL_ERROR, "InternalError"),
        (faults.SLOW_DOWN, "SlowDown"),
        (faults.RESET_BEFORE, "reset"),
        (faults.CUT_BODY, "not completed"),
        (faults.STALL, "timeout"),
    ],
)
def test_a_fault_that_does_not_pass_names_the_object(
    store: ObjectStore, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{store.uri}/file", content(100_000))
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    fs, path = storage.filesystem(f"{store.uri}/file")
    stream = fs.open(path, "rb")
    with store.proxy.faults(kinds=(kind,), methods=("GET",), containing="file", most=MANY) as plan:
        for read in (lambda: storage.read_bytes(f"{store.uri}/file"), stream.read):
            with pytest.raises(OSError, match=rf"(?i){store.uri}/file: .*{reason}.* \(3 attempts\)"):
                read()
    assert 2 * 3 <= plan.injected[kind] <= 2 * 3 * 2  # aiohttp asks once more itself where a kept connection breaks


def test_a_trickle_ends_by_the_time_of_an_attempt(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{store.uri}/file", b"12345")
    monkeypatch.setattr(s3, "ATTEMPT_LIMIT_S", 0.07)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    slow = {"kinds": (faults.SLOW_BODY,), "methods": ("GET",), "most": MANY}
    with store.proxy.faults(**slow) as plan, pytest.raises(OSError, match=rf"{store.uri}/file: .*too slow"):
        storage.read_bytes(f"{store.uri}/file")
    assert plan.injected[faults.SLOW_BODY] == 2


def test_a_wait_that_the_store_asks_for_is_kept(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LONGEST_PAUSE_S", 20.0)
    with store.proxy.faults(kinds=(faults.SLOW_DOWN_RETRY_AFTER,), methods=("PUT",)):
        start = time.monotonic()
        storage.write_bytes(f"{store.uri}/file", b"x")
    assert time.monotonic() - start >= 1


def test_what_is_refused_is_not_tried_again(store: ObjectStore) -> None:
    with store.proxy.faults(kinds=(faults.ACCESS_DENIED,), most=MANY) as plan:
        with pytest.raises(PermissionError, match=rf"{store.uri}/file: GetObject: AccessDenied"):
            storage.read_bytes(f"{store.uri}/file")
        with pytest.raises(PermissionError, match=f"{store.uri}/file"):
            storage.exists(f"{store.uri}/file")
        with pytest.raises(OSError, match=rf"{store.uri}' cannot be written: .*AccessDenied"):
            storage.check_writable(store.uri)
    assert len(plan.requests) == 3


def test_what_is_missing_is_named(store: ObjectStore) -> None:
    with pytest.raises(FileNotFoundError, match=f"{store.uri}/none"):
        storage.read_bytes(f"{store.uri}/none")
    with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/file.*NoSuchBucket"):
        storage.read_bytes("s3://no-such-bucket/file")
    with pytest.raises(OSError, match=r"s3://no-such-bucket/x' cannot be written.*NoSuchBucket"):
        storage.check_writable("s3://no-such-bucket/x")
    assert not storage.exists("s3://no-such-bucket")
    assert not storage.exists("s3://no-such-bucket/file")
    assert storage.names("s3://no-such-bucket/file") == []


def test_an_endpoint_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"s3://bucket/file: .*http://127\.0\.0\.1:9.*8 attempts"):
        storage.read_bytes("s3://bucket/file")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(OSError, match=r"s3://bucket/file: .*no address"):
        storage.exists("s3://bucket/file")


def test_a_senseless_number_of_attempts_is_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(OSError, match=r"AWS_MAX_ATTEMPTS .*'many'"):
        storage.exists(f"{store.uri}/file")


def test_listings_are_never_stale(store: ObjectStore) -> None:
    found: list[list[str]] = []
    for name in ("a", "b"):
        direct(store).put_object(Bucket=BUCKET, Key=f"{store.uri.removeprefix('s3://bucket/')}/{name}", Body=b"x")
        found.append(storage.names(store.uri))
        thread = threading.Thread(target=lambda: found.append(storage.names(store.uri)))
        thread.start()
        thread.join()
        assert storage.exists(f"{store.uri}/{name}")
    assert found == [["a"], ["a"], ["a", "b"], ["a", "b"]]


def test_a_forked_process_and_a_pickled_file_system_work(store: ObjectStore) -> None:
    storage.write_bytes(f"{store.uri}/file", b"x")
    with multiprocessing.get_context("fork").Pool(1) as forked:
        assert forked.apply_async(storage.read_bytes, (f"{store.uri}/file",)).get(timeout=60) == b"x"
    fs, path = storage.filesystem(f"{store.uri}/file")
    copy = pickle.loads(pickle.dumps(fs))
    assert isinstance(copy, s3.S3)
    assert copy.cat_file(path) == b"x"


def test_empty_objects_that_mark_folders_are_no_files(store: ObjectStore) -> None:
    key = store.uri.removeprefix("s3://bucket/")
    direct(store).put_object(Bucket=BUCKET, Key=f"{key}/", Body=b"")
    assert storage.names(store.uri) == []
    storage.write_bytes(f"{store.uri}/file", b"x")
    assert storage.names(store.uri) == ["file"]


@pytest.fixture
def without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with no credentials, and a folder for files that hold some."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


@pytest.mark.usefixtures("without_keys")
def test_missing_credentials_are_named(store: ObjectStore) -> None:
    for operation in (storage.exists, storage.read_bytes, storage.names):
        with pytest.raises(PermissionError, match=rf"{store.uri}.*no credentials found: set AWS_ACCESS_KEY_ID"):
            operation(store.uri)


def test_a_profile_has_keys_and_endpoint(store: ObjectStore, without_keys: Path, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (without_keys / "credentials").write_text(
        "[mine]\naws_access_key_id = key\naws_secret_access_key = secret-of-mine\n"
    )
    (without_keys / "config").write_text(f"[profile mine]\nendpoint_url = {os.path.join(store.proxy.url, '')}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with store.proxy.faults(rate=0) as plan:
        storage.write_bytes(f"{store.uri}/file", b"x")
    assert plan.access_keys == {"key"}
    with store.proxy.faults(kinds=(faults.ACCESS_DENIED,)), pytest.raises(PermissionError) as caught:
        storage.read_bytes(f"{store.uri}/file")
    assert caught.value.__cause__ is not None
    assert "secret-of-mine" not in f"{caught.value} {caught.value.__cause__!r} {vars(caught.value.__cause__)}"
    monkeypatch.setenv("AWS_PROFILE", "theirs")
    with pytest.raises(OSError, match=rf"{store.uri}/file: .*theirs"):
        storage.exists(f"{store.uri}/file")


def test_a_web_identity_is_exchanged_for_keys(store: ObjectStore, without_keys: Path, monkeypatch) -> None:
    (without_keys / "token").write_text("a-signed-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(without_keys / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    with store.proxy.faults(rate=0) as plan:
        storage.write_bytes(f"{store.uri}/file", b"x")
        assert storage.read_bytes(f"{store.uri}/file") == b"x"
    assert plan.requests.count("POST /") == 1
    assert all(key.startswith("ASIA") for key in plan.access_keys)  # temporary ones
    (without_keys / "token").unlink()
    monkeypatch.setenv("AWS_ROLE_SESSION_NAME", "another")
    with pytest.raises(OSError, match=rf"{store.uri}/file: .*token"):
        storage.exists(f"{store.uri}/file")
