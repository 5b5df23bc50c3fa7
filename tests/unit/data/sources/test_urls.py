"""Lists of addresses, fetched from a real server that fails in the ways servers do."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.data.manifest import DataError
from unclip.data.sources import FetchPolicy, UrlSourceConfig
from unclip.data.sources.fetch import is_public


class Handler(BaseHTTPRequestHandler):
    """`/ok/…` gives its own path; other paths fail as their names say. What was asked is written down."""

    server: Server

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.times.append(time.monotonic())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"answer_{kind}")(rest, self.server.asked[self.path])

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self, rest: str, count: int) -> None:
        self.reply(200, rest.encode())

    def answer_slow(self, rest: str, count: int) -> None:
        """The earlier in a list, the later it is answered.

        A request counts as active up to its answer: a client that has the answer may ask again at once.
        """
        with self.server.lock:
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        time.sleep(float(rest))
        with self.server.lock:
            self.server.active -= 1
        self.reply(200, rest.encode())

    def answer_status(self, rest: str, count: int) -> None:
        self.reply(int(rest))

    def answer_twice(self, rest: str, count: int) -> None:
        self.reply(int(rest) if count <= 2 else 200, b"" if count <= 2 else b"third")

    def answer_later(self, rest: str, count: int) -> None:
        self.reply(429, Retry_After=rest) if count == 1 else self.reply(200, b"later")

    def answer_cut(self, rest: str, count: int) -> None:
        self.reply(200, b"whole"[: 2 if count <= int(rest) else 5], length=5)

    def answer_drip(self, rest: str, count: int) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def answer_large(self, rest: str, count: int) -> None:
        """Without a length, so that only counting helps."""
        self.send_response(200)
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(bytes(1000))

    def answer_loop(self, rest: str, count: int) -> None:
        self.reply(302, Location=f"/loop/{int(rest) + 1}")

    def answer_moved(self, rest: str, count: int) -> None:
        self.reply(301, Location=rest.replace("~", "/"))

    def answer_headers(self, rest: str, count: int) -> None:
        self.reply(200, json.dumps(dict(self.headers)).encode(), Set_Cookie="a=b")

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.active = self.most_active = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def read(uri: Path, *, fetch: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, Any]]:
    policy = FetchPolicy(**{"allow_private_addresses": True, "backoff_s": 0.01, **(fetch or {})})
    source = UrlSourceConfig(uri=str(uri), fetch=policy, **settings).build()
    tables = [table for part in source.parts() for table in source.read(part)]
    assert all(table.schema == source.schema() for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def fetch(tmp_path: Path, urls: list[str], **policy: Any) -> list[dict[str, Any]]:
    (tmp_path / "list.txt").write_text("\n".join(urls))
    return read(tmp_path / "list.txt", fetch=policy, caption_column=None)


def one(tmp_path: Path, url: str, **policy: Any) -> tuple[bytes | None, str | None]:
    """Picture and detail of one address."""
    (row,) = fetch(tmp_path, [url], **policy)
    assert row["reason"] == (None if row["image"] is not None else "fetch_failed")
    return row["image"], row["detail"]


def test_rows_come_in_the_order_of_the_list(server: Server, tmp_path: Path) -> None:
    paths = [f"slow/{0.3 - 0.02 * number:.2f}" for number in range(12)]
    rows = fetch(tmp_path, [server.url(path) for path in paths], per_host=8)
    assert [row["image"].decode() for row in rows] == [path[5:] for path in paths]
    assert [row["key"] for row in rows] == [f"list.txt:{number}" for number in range(12)]
    assert 1 < server.most_active <= 8


def test_limits_on_downloads_at_once(server: Server, tmp_path: Path) -> None:
    fetch(tmp_path, [server.url("slow/0.05")] * 12, per_host=3)
    assert 1 < server.most_active <= 3
    server.most_active = 0
    fetch(tmp_path, [server.url("slow/0.05")] * 12, per_host=8, concurrency=2)
    assert server.most_active <= 2


def test_interval_between_requests_to_a_host(server: Server, tmp_path: Path) -> None:
    fetch(tmp_path, [server.url(f"ok/{number}") for number in range(4)], host_interval_s=0.1)
    times = sorted(server.times)
    assert times[-1] - times[0] > 0.15  # half of the three intervals: the server may note the first one late


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "tsv"])
def test_lists_of_every_form(server: Server, tmp_path: Path, form: str) -> None:
    records = [{"URL": server.url(f"ok/{n}"), "TEXT": f"caption, {n} é", "score": n / 2} for n in range(5)]
    path = tmp_path / f"list.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    else:
        comma = "\t" if form == "tsv" else ","
        lines = [comma.join(f'"{value}"' for value in record.values()) for record in records]
        path.write_text("\n".join([comma.join(records[0]), *lines]))
    settings = {"url_column": "URL", "caption_column": "TEXT", "fields": {"score": "float64"}}
    rows = read(path, **settings)
    assert [row["image"] for row in rows] == [b"%d" % n for n in range(5)]
    assert [row["caption"] for row in rows] == [record["TEXT"] for record in records]
    assert [row["score"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [json.loads(row["metadata"])["URL"] for row in rows] == [record["URL"] for record in records]
    assert read(path, rows_per_part=3, **settings) == rows
    assert read(path, rows_per_part=1, **settings) == rows


def test_what_fails_for_good_is_asked_once(server: Server, tmp_path: Path) -> None:
    for status in (404, 403, 410, 204):
        assert one(tmp_path, server.url(f"status/{status}")) == (None, f"HTTP {status}")
    assert set(server.asked.values()) == {1}


def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path) -> None:
    for status in (500, 502, 503, 504, 429, 408):
        assert one(tmp_path, server.url(f"twice/{status}")) == (b"third", None)
    assert set(server.asked.values()) == {3}
    assert one(tmp_path, server.url("status/500"), retries=2) == (None, "HTTP 500; 3 attempts")
    assert server.asked["/status/500"] == 3


def test_retry_after_is_waited_for_within_bounds(server: Server, tmp_path: Path) -> None:
    assert one(tmp_path, server.url("later/1"))[0] == b"later"
    assert server.times[1] - server.times[0] >= 1.0
    assert one(tmp_path, server.url("later/3600"), max_wait_s=0.05)[0] == b"later"
    assert one(tmp_path, server.url("later/Fri, 31 Dec 2100 23:59:59 GMT"), max_wait_s=0.05)[0] == b"later"
    assert one(tmp_path, server.url("later/soon"))[0] == b"later"


def test_cut_bodies_are_fetched_again_and_never_taken(server: Server, tmp_path: Path) -> None:
    assert one(tmp_path, server.url("cut/2")) == (b"whole", None)
    image, detail = one(tmp_path, server.url("cut/99"), retries=1)
    assert image is None
    assert detail is not None
    assert "ClientPayloadError" in detail


def test_slow_bodies_end_at_the_time_limit(server: Server, tmp_path: Path) -> None:
    assert one(tmp_path, server.url("drip"), timeout_s=0.3, retries=1) == (None, "no whole answer in 0.3 s; 2 attempts")


def test_large_bodies_are_dropped(server: Server, tmp_path: Path) -> None:
    assert one(tmp_path, server.url("large"), max_bytes=5000) == (None, "HTTP 200, but more than 5000 bytes")
    assert one(tmp_path, server.url("ok/12345"), max_bytes=5)[0] == b"12345"


def test_redirects(server: Server, tmp_path: Path) -> None:
    assert one(tmp_path, server.url("moved/~ok~there")) == (b"there", None)
    assert one(tmp_path, server.url("loop/0"), max_redirects=3) == (None, "more than 3 redirects")
    assert server.asked.keys() >= {f"/loop/{number}" for number in range(4)}
    assert "/loop/4" not in server.asked
    assert one(tmp_path, server.url("moved/file:~~~etc~passwd")) == (None, "no http or https address")


def test_addresses_that_are_none(tmp_path: Path) -> None:
    urls = ["ftp://host/a.jpg", "file:///etc/passwd", "http://", "a.jpg", "http://[::1", "http://host:99999999/"]
    rows = fetch(tmp_path, urls)
    assert {row["reason"] for row in rows} == {"fetch_failed"}
    assert all("address" in row["detail"] for row in rows)


def test_connection_refused_and_unknown_host(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1/a.jpg", "http://no-such-host.invalid/a.jpg"):
        image, detail = one(tmp_path, url, retries=1)
        assert image is None
        assert detail is not None
        assert detail.endswith("2 attempts")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f000001", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_private_addresses_are_refused_however_they_are_spelt(server: Server, tmp_path: Path, host: str) -> None:
    url = f"http://{host}:{server.server_port}/ok/secret"
    image, detail = one(tmp_path, url, allow_private_addresses=False)
    assert image is None
    assert detail is not None
    assert "address" in detail
    assert not server.asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.0.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True), ("2002:0a00:0001::", False), ("64:ff9b::a00:1", False),
        ("127.1", False), ("host", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_what_servers_are_told(server: Server, tmp_path: Path) -> None:
    rows = fetch(tmp_path, [server.url("headers/1"), server.url("headers/2")], concurrency=1, user_agent="someone")
    for row in rows:
        headers = json.loads(row["image"])
        assert headers["User-Agent"] == "someone"
        assert headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in headers


def test_bad_rows_have_their_reasons(server: Server, tmp_path: Path) -> None:
    good = json.dumps({"url": server.url("ok/1"), "caption": "fine"}).encode()
    lines = [
        good, b"{", b'{"caption": "x"}', b'{"url": 5}', b'{"url": " "}', b'{"url": "http://h/", "caption": 5}',
        b'{"url": "http://h/", "caption": "\xff"}', good,
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"url": [server.url("ok/2")] * 2, "caption": text}), tmp_path / "c.parquet")
    rows = read(tmp_path)
    assert [row["reason"] for row in rows] == [
        None, "bad_row", "no_url", "no_url", "no_url", "bad_row", "invalid_utf8", None,
        "unreadable_shard", None, "invalid_utf8",
    ]  # fmt: skip
    assert [row["image"] for row in rows if row["reason"] is None] == [b"1", b"1", b"2"]
    assert all((row["image"] is None) == (row["reason"] is not None) for row in rows)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())], ids=str
)
def test_text_of_every_type_that_is_not_utf8(server: Server, tmp_path: Path, kind: pa.DataType) -> None:
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    raw = pa.array([b"fine", b"caf\xe9"], pa.large_binary() if pa.types.is_large_string(stored) else pa.binary())
    text = pa.Array.from_buffers(stored, 2, raw.buffers())
    if pa.types.is_dictionary(kind):
        text = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), text)
    pq.write_table(pa.table({"url": [server.url("ok/1")] * 2, "caption": text}), tmp_path / "a.parquet")
    rows = read(tmp_path)
    assert [(row["caption"], row["reason"]) for row in rows] == [("fine", None), ("caf\\udce9", "invalid_utf8")]


def test_each_row_of_a_list_that_breaks_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"url": [f"ftp://none/{n}" for n in range(12)]}
    pq.write_table(pa.table(columns), path, row_group_size=6, use_dictionary=False, compression="none")
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    raw[start : start + 30] = b"\xff" * 30
    path.write_bytes(raw)
    rows = read(path, caption_column=None, rows_per_part=4)
    assert [row["key"] for row in rows] == [f"a.parquet:{number}" for number in range(12)]
    assert [row["reason"] for row in rows] == ["unreadable_shard"] * 6 + ["fetch_failed"] * 6


def test_a_reader_that_stops_early_leaves_nothing_running(server: Server, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join([server.url("slow/0.05")] * 600))
    policy = FetchPolicy(allow_private_addresses=True, per_host=32)
    source = UrlSourceConfig(uri=str(tmp_path), caption_column=None, fetch=policy).build()
    tables = source.read(source.parts()[0])
    assert next(tables).num_rows == 256
    tables.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "downloads"]
    assert sum(server.asked.values()) < 600


def test_what_the_first_list_lacks_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("link,caption\nx,y\n")
    with pytest.raises(DataError, match=r"a\.csv' has no field 'url'; it has link, caption"):
        UrlSourceConfig(uri=str(tmp_path)).build().parts()
    with pytest.raises(DataError, match="has no field 'text'"):
        UrlSourceConfig(uri=str(tmp_path), url_column="link", caption_column="text").build().parts()
    (tmp_path / "a.csv").write_text("url,caption\n")
    with pytest.raises(DataError, match="holds no rows"):
        UrlSourceConfig(uri=str(tmp_path)).build().parts()
