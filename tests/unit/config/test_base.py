"""Config: strict, overridable, documented; every complaint names field and value."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from unclip.config.base import Config, ConfigError, describe


class Inner(Config):
    """Nested settings."""

    width: int = Field(default=8, gt=0)
    """Channels of the first level."""
    name: Literal["a", "b"] = "a"


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = 2.0


class Choice(Config):
    use: Literal["auto", "yes", "no"] = "auto"


class Outer(Config):
    """Settings with every kind of field."""

    steps: int
    """How long."""
    rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()
    shape: Circle | Square = Field(default=Circle(), discriminator="kind")
    path: str | None = None


def test_round_trip_through_plain_values() -> None:
    config = Outer(steps=3, shape=Square(side=4.0))
    assert Outer.from_dict(config.to_dict()) == config


def test_overrides_are_typed_and_nested() -> None:
    config = Outer(steps=3).override(["inner.width=32", "rate=1e-4", "sizes=[4, 8]", "path=s3://bucket/x", "steps=7"])
    assert (config.inner.width, config.rate, config.sizes, config.path, config.steps) == (
        32,
        1e-4,
        (4, 8),
        "s3://bucket/x",
        7,
    )
    assert Outer(steps=3).inner.width == 8


def test_text_is_taken_as_it_is() -> None:
    for text in ("a heart #1", "a: b", "2026", "1e3"):
        assert Outer(steps=1).override([f"path={text}"]).path == text
    assert Outer(steps=1, path="x").override(["path=null"]).path is None
    assert Choice().override(["use=no"]).use == "no"  # which YAML takes for a boolean


def test_a_bad_value_in_a_variant_is_named_as_it_is_set() -> None:
    with pytest.raises(ConfigError, match=r"^shape\.side = 'wide'"):
        Outer(steps=1, shape=Square()).override(["shape.side=wide"])


def test_override_may_choose_another_variant() -> None:
    config = Outer(steps=1).override(["shape.kind=square", "shape.side=5"])
    assert config.shape == Square(side=5.0)


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("inner.widht=3", ["inner.widht", "unknown field", "did you mean 'width'"]),
        ("nothing=3", ["nothing", "unknown field", "known fields", "steps"]),
        ("inner.width=0", ["inner.width = 0", "greater than 0"]),
        ("inner.width=many", ["inner.width = 'many'", "integer"]),
        ("inner.name=c", ["inner.name = 'c'", "'a' or 'b'"]),
        ("shape.diameter=3", ["shape.diameter: unknown field", "radius"]),
        ("inner.width", ["inner.width", "FIELD=VALUE"]),
    ],
)
def test_bad_overrides_name_field_value_and_what_is_allowed(assignment: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Outer(steps=1).override([assignment])
    for part in parts:
        assert part in str(error.value)


def test_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="steps: required"):
        Outer.from_dict({"rate": 1.0})


def test_every_field_is_described_with_value_and_meaning() -> None:
    lines = list(describe(Outer(steps=3)))
    assert "steps = 3  (How long.; required)" in lines
    assert "inner.width = 8  (Channels of the first level.)" in lines
    assert 'inner.name = "a"  (one of a, b)' in lines
    assert "shape.radius = 1.0" in lines


def test_files_are_read_and_their_faults_named(tmp_path) -> None:
    good = tmp_path / "run.yaml"
    good.write_text("steps: 5\ninner: {width: 16}\n")
    assert Outer.load(good).inner.width == 16
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        Outer.load(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        Outer.load(tmp_path / "list.yaml")
