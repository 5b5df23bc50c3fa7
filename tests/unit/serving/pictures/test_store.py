"""Pictures by address: names that nobody guesses, and an end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from tests.support.s3 import object_store

from unclip.serving.errors import NotFound
from unclip.serving.pictures import store as module
from unclip.serving.pictures.store import PictureStore


def expired_name(seconds_ago: int, letter: str) -> str:
    return f"{int(time.time()) - seconds_ago:010x}-{letter * 26}.png"


def wait_for_sweeps() -> None:
    for thread in threading.enumerate():
        if thread.name == "unclip-pictures":
            thread.join(10)


def test_what_is_put_can_be_had(tmp_path: Path) -> None:
    store = PictureStore(str(tmp_path), 60)
    for form, media_type in (("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")):
        assert store.get(store.put(form.encode(), form)) == (form.encode(), media_type)


def test_names_hold_128_random_bits(tmp_path: Path) -> None:
    store = PictureStore(str(tmp_path), 60)
    names = {store.put(b"", "png") for _ in range(100)}
    assert len(names) == 100
    assert len({name.split("-")[1] for name in names}) == 100
    assert all(len(name.split("-")[1]) == len(".png") + 26 for name in names)


def test_another_process_finds_them(tmp_path: Path) -> None:
    name = PictureStore(str(tmp_path), 60).put(b"here", "png")
    assert PictureStore(str(tmp_path), 1).get(name)[0] == b"here"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.png",
        "../secret.png",
        "/etc/passwd",
        "..%2fsecret",
        "0" * 10 + "-" + "a" * 26 + ".svg",
        "x\0.png",
        "secret.png",
    ],
)
def test_other_names_are_not_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(NotFound) as caught:
        PictureStore(str(tmp_path / "pictures"), 60).get(name)
    assert caught.value.status == 404
    with pytest.raises(NotFound):
        PictureStore(str(tmp_path), 60).get(name)


def test_guessed_names_are_not_found(tmp_path: Path) -> None:
    store = PictureStore(str(tmp_path), 60)
    name = store.put(b"mine", "png")
    with pytest.raises(NotFound):
        store.get(name[:-6] + ("a" if name[-6] != "a" else "b") + ".png")


def test_pictures_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PictureStore(str(tmp_path), 60)
    name = store.put(b"", "png")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 58)
    store.get(name)
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(NotFound):
        store.get(name)
    later = int(name[:10], 16) + 1000
    with pytest.raises(NotFound):  # nobody lengthens a life by asking for another
        store.get(f"{later:010x}{name[10:]}")


def test_sweeping_removes_what_has_ended_and_nothing_else(tmp_path: Path) -> None:
    store = PictureStore(str(tmp_path), 60)
    alive = store.put(b"alive", "png")
    (tmp_path / expired_name(1, "a")).write_bytes(b"old")
    (tmp_path / "something-else.png").write_bytes(b"theirs")
    wait_for_sweeps()
    store.sweep()
    assert sorted(os.listdir(tmp_path)) == sorted([alive, "something-else.png"])


def test_a_sweep_is_bounded_and_begins_with_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMOVED", 2)
    names = [expired_name(seconds, "a") for seconds in (30, 20, 10)]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    store = PictureStore(str(tmp_path), 60)
    store.sweep()
    assert os.listdir(tmp_path) == names[2:]
    store.sweep()
    assert os.listdir(tmp_path) == []


def test_too_many_bytes_drive_the_oldest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 25)
    first = PictureStore(str(tmp_path), 60).put(bytes(10), "png")
    others = [PictureStore(str(tmp_path), 70).put(bytes(10), "png") for _ in range(2)]
    PictureStore(str(tmp_path), 60).sweep()
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    assert first not in others


def test_putting_sweeps_now_and_then(tmp_path: Path) -> None:
    old = tmp_path / expired_name(1, "a")
    old.write_bytes(b"old")
    store = PictureStore(str(tmp_path), 60)
    store.put(b"", "png")
    wait_for_sweeps()
    assert not old.exists()
    old.write_bytes(b"old")
    store.put(b"", "png")  # less than a minute later
    wait_for_sweeps()
    assert old.exists()


def test_what_a_sweep_leaves_the_next_picture_has_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMOVED", 2)
    for letter in "abc":
        (tmp_path / expired_name(1, letter)).write_bytes(b"old")
    store = PictureStore(str(tmp_path), 60)
    names = []
    for left in (1, 0):
        names.append(store.put(b"", "png"))
        wait_for_sweeps()
        assert len(os.listdir(tmp_path)) == len(names) + left


def test_pictures_on_an_object_store() -> None:
    with object_store() as place:
        store = PictureStore(f"{place.uri}/pictures", 60)
        name = store.put(b"far", "webp")
        assert store.get(name) == (b"far", "image/webp")
        with pytest.raises(NotFound):
            store.get(f"{name[:11]}{'a' * 26}.webp")
        PictureStore(f"{place.uri}/pictures", 60).sweep()
        assert store.get(name)[0] == b"far"
