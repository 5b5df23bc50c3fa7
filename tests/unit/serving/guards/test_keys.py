"""API keys: the file, the job that writes it, who is let in, and how much."""

from __future__ import annotations

import gc
import json
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import api_key
from tests.support.s3 import object_store

from unclip.config.base import ConfigError
from unclip.serving.errors import InvalidRequest, RateLimited, Unauthorized
from unclip.serving.guards import keys as module
from unclip.serving.guards.keys import ApiKey, KeyLimits, KeyRing, hash_key, new_key, read_key_file

REPOSITORY = Path(__file__).parents[4]
SHA256 = "0" * 64


def write(path: Path, **keys: str) -> str:
    """A file with these keys by their ids."""
    records = [{"id": name, "sha256": hash_key(key)} for name, key in keys.items()]
    path.write_text(json.dumps({"keys": records}))
    return str(path)


def record(*fields: str) -> str:
    """The text of a file of keys with these fields."""
    return '{"keys": [' + ", ".join(f'{{"sha256": "{SHA256}", {each}}}' for each in fields) + "]}"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def knows(ring: KeyRing, key: str) -> bool:
    with suppress(Unauthorized):
        ring.of(f"Bearer {key}")
        return True
    return False


def test_keys_are_256_random_bits() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(re.fullmatch(r"uk-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_the_hash_is_plain_sha256() -> None:
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_who_has_a_key_is_known_by_it(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "bob")}
    ring = KeyRing(write(tmp_path / "keys.json", **keys))
    assert ring.of(f"Bearer {keys['bob']}") == ApiKey("bob", 60.0, 10)
    assert ring.of(f"bearer  {keys['alice']} ").id == "alice"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "uk-abc", "Bearer uk-abc", f"Bearer {SHA256}", "Bearer ünï"]
)
def test_nobody_else_is_let_in(tmp_path: Path, header: str | None) -> None:
    ring = KeyRing(write(tmp_path / "keys.json", alice=new_key()))
    with pytest.raises(Unauthorized) as caught:
        ring.of(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert "uk-abc" not in caught.value.message


def test_the_hash_is_no_key(tmp_path: Path) -> None:
    key = new_key()
    ring = KeyRing(write(tmp_path / "keys.json", alice=key))
    assert knows(ring, key)
    assert not knows(ring, hash_key(key))


def test_changes_count_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELOAD_S", 0.01)
    old, new = new_key(), new_key()
    ring = KeyRing.load(write(tmp_path / "keys.json", alice=old))
    assert knows(ring, old)
    write(tmp_path / "keys.json", bob=new)
    wait_until(lambda: knows(ring, new))
    assert not knows(ring, old)


def test_the_thread_ends_with_its_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELOAD_S", 0.01)
    before = set(threading.enumerate())
    ring = KeyRing.load(write(tmp_path / "keys.json", alice=new_key()))
    (thread,) = set(threading.enumerate()) - before
    time.sleep(0.05)
    assert thread.is_alive()
    del ring
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": [{"id": "x"}]}', '{"keys": [], "more": 1}'])
def test_a_broken_file_leaves_the_keys_as_they_were(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, file = new_key(), tmp_path / "keys.json"
    ring = KeyRing(write(file, alice=key))
    file.write_text(content)
    ring.reload()
    assert knows(ring, key)
    assert "the API keys stay as they were" in caplog.text
    file.unlink()
    ring.reload()
    assert knows(ring, key)
    write(file)
    ring.reload()
    assert not knows(ring, key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no", "not JSON"),
        ("[]", "must hold an object"),
        (record('"id": "a b"'), r"keys\.0\.id = 'a b'"),
        (record('"id": "a", "pictures_at_once": 0'), r"keys\.0\.pictures_at_once = 0"),
        (record('"id": "a"', '"id": "a"'), "'a' stands there twice"),
    ],
)
def test_a_broken_file_is_refused_at_the_start(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        KeyRing.load(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.load(str(tmp_path / "gone.json"))


def test_a_key_in_place_of_its_hash_is_shown_to_nobody(tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [{"id": "alice", "sha256": key}]}))
    with pytest.raises(ConfigError, match="must be 64 hexadecimal digits") as caught:
        read_key_file(str(file))
    assert key[3:] not in str(caught.value)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(limits: KeyLimits, key: ApiKey) -> int | None:
    """How long to wait; None where the request is let in."""
    try:
        limits.count_request(key)
    except RateLimited as error:
        return error.retry_after
    return None


def served(limits: KeyLimits, key: ApiKey) -> bool:
    return refusal(limits, key) is None


def test_a_minutes_worth_may_come_at_once_and_then_no_more() -> None:
    clock = Clock()
    limits, key = KeyLimits(clock=clock), ApiKey("alice", 30, 1)
    assert [served(limits, key) for _ in range(31)] == [True] * 30 + [False]
    with pytest.raises(RateLimited) as caught:
        limits.count_request(key)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "rate_limit_exceeded", 2)
    clock.now += 2
    assert [served(limits, key) for _ in range(2)] == [True, False]
    assert served(limits, ApiKey("bob", 30, 1))


@settings(deadline=None)
@given(
    st.floats(0.5, 600), st.integers(1, 5), st.lists(st.floats(0, 30, allow_subnormal=False), min_size=1, max_size=200)
)
def test_no_key_gets_more_than_its_rate_and_a_minutes_worth(rate: float, share: int, pauses: list[float]) -> None:
    clock = Clock()
    limits, key = KeyLimits(share, clock=clock), ApiKey("alice", rate, 1)
    part, times = rate / share, []
    for pause in pauses:
        clock.now += pause
        wait = refusal(limits, key)
        if wait is not None:
            clock.now += wait
            assert refusal(limits, key) is None
        times.append(clock.now)
    for count, last in enumerate(times, 1):
        assert count <= max(1, part) + (last - times[0]) * part / 60 + 1e-6


def test_who_keeps_to_the_rate_is_never_refused() -> None:
    clock = Clock()
    limits, key = KeyLimits(3, clock=clock), ApiKey("alice", 60, 1)
    for _ in range(500):
        assert served(limits, key)
        clock.now += 3


def test_a_changed_rate_counts() -> None:
    limits = KeyLimits(clock=Clock())
    assert [served(limits, ApiKey("alice", 1, 1)) for _ in range(2)] == [True, False]
    assert [served(limits, ApiKey("alice", 2, 1)) for _ in range(3)] == [True, True, False]


def test_pictures_at_once() -> None:
    limits, key = KeyLimits(), ApiKey("alice", 60, 4)
    with limits.hold(key, 3):
        with pytest.raises(RateLimited) as caught, limits.hold(key, 2):
            pass
        assert caught.value.retry_after == 2
        with limits.hold(key, 1), limits.hold(ApiKey("bob", 60, 4), 4):
            pass
    with limits.hold(key, 4):
        pass
    with pytest.raises(InvalidRequest, match="n = 5"), limits.hold(key, 5):
        pass


def test_pictures_are_given_back_after_errors() -> None:
    limits, key = KeyLimits(), ApiKey("alice", 60, 1)
    for _ in range(3):
        with pytest.raises(KeyError), limits.hold(key, 1):
            raise KeyError


def test_processes_share_a_keys_pictures() -> None:
    limits, key = KeyLimits(2), ApiKey("alice", 60, 5)
    with limits.hold(key, 2), pytest.raises(RateLimited), limits.hold(key, 1):
        pass
    with (
        limits.hold(key, 5),
        pytest.raises(RateLimited),
        limits.hold(key, 1),
    ):  # alone it may have all that it may ask for
        pass


@given(st.integers(1, 12), st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_never_more_pictures_than_allowed(most: int, share: int, steps: list[tuple[bool, int]]) -> None:
    limits, key = KeyLimits(share), ApiKey("alice", 60, most)
    held: list[tuple[int, ExitStack]] = []
    for begins, pictures in steps:
        if not begins and held:
            held.pop(0)[1].close()
            continue
        stack = ExitStack()
        with suppress(RateLimited, InvalidRequest):
            stack.enter_context(limits.hold(key, pictures))
            held.append((pictures, stack))
        under_way = sum(count for count, _ in held)
        assert under_way <= (most if len(held) == 1 else max(1, most // share))
    for _, stack in held:
        stack.close()
    with limits.hold(key, most):
        pass


def test_threads_never_lose_count() -> None:
    limits, key = KeyLimits(clock=Clock()), ApiKey("alice", 500, 1)
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.extend(served(limits, key) for _ in range(100))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 500


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = api_key.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err


def test_the_job_makes_lists_and_revokes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    limits = ("--requests-per-minute", "7", "--pictures-at-once", "3", "--note", "the app")
    status, key, _ = run(capsys, "create", "--file", file, "--id", "alice", *limits)
    assert status == 0
    assert KeyRing(file).of(f"Bearer {key}") == ApiKey("alice", 7.0, 3)
    assert key not in Path(file).read_text()
    _, other, _ = run(capsys, "create", "--file", file, "--id", "bob")
    _, listed, _ = run(capsys, "list", "--file", file)
    assert [line.split("\t")[0] for line in listed.splitlines()[1:]] == ["alice", "bob"]
    assert "the app" in listed
    assert key not in listed
    assert run(capsys, "revoke", "--file", file, "--id", "alice")[0] == 0
    assert not knows(KeyRing(file), key)
    assert knows(KeyRing(file), other)


def test_the_file_is_its_owners_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    for name in ("alice", "bob"):
        run(capsys, "create", "--file", str(file), "--id", name)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_job_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    assert "cannot be read" in run(capsys, "list", "--file", file)[2]
    run(capsys, "create", "--file", file, "--id", "alice")
    before = Path(file).read_bytes()
    for arguments, message in (
        (("create", "--id", "alice"), "has a key already"),
        (("create", "--id", "not an id"), "id = 'not an id'"),
        (("create",), "id = ''"),
        (("revoke", "--id", "bob"), "id = 'bob': has no key"),
    ):
        status, out, err = run(capsys, *arguments, "--file", file)
        assert (status, out) == (2, "")
        assert message in err
    assert Path(file).read_bytes() == before


def test_the_job_runs_as_a_script(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "jobs" / "api_key.py"),
        "create",
        "--file",
        str(tmp_path / "k"),
        "--id",
        "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert knows(KeyRing(str(tmp_path / "k")), done.stdout.strip())


def test_keys_on_an_object_store(capsys: pytest.CaptureFixture[str]) -> None:
    with object_store() as place:
        file = f"{place.uri}/keys.json"
        capsys.readouterr()  # of the store's server
        _, key, _ = run(capsys, "create", "--file", file, "--id", "alice")
        ring = KeyRing(file)
        assert knows(ring, key)
        run(capsys, "revoke", "--file", file, "--id", "alice")
        ring.reload()
        assert not knows(ring, key)
