"""The model card of a bundle: `README.md` beside its stages, as the Hugging Face hub shows it.

It says what the bundle's own files say (stages, what each was trained on and how, the CLIP, whose pictures it learned from),
and what `card.json` adds that no file can know: the licence of the weights, and an evaluation. The same files make the same
card. It is no part of what is hashed, so a bundle's digest is the same with and without it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.pipelines.bundle import Bundle, BundleError, StageManifest
from unclip.pipelines.stages import DecoderStageConfig, StageConfig, StageName, UpsamplerStageConfig
from unclip.utils import storage

CARD_FILE, FACTS_FILE = "README.md", "card.json"
LICENCE_PATTERN = r"^[a-z0-9][a-z0-9.-]*$"
_NO_LICENCE = "other"
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-!|~&$:])")
_PAPER = "Ramesh et al. 2022, *Hierarchical Text-Conditional Image Generation with CLIP Latents* (arXiv 2204.06125)"
_STAGES: Mapping[StageName, str] = {
    "clip": "pictures and captions in one space",
    "noised_clip": "guides the decoder towards a caption",
    "classifier": "guides the decoder towards a class",
    "prior": "caption to CLIP image embedding",
    "decoder": "to the first picture",
    "upsampler_256": "to the next size",
    "upsampler_1024": "to the last size",
}


class CardFacts(Config):
    """The content of `card.json`: what is said of a bundle by those who publish it."""

    licence: str | None = Field(default=None, pattern=LICENCE_PATTERN)
    """of the weights, by the hub's identifier, as apache-2.0 or cc-by-sa-4.0; null: none is stated"""
    evaluation: dict[str, Any] | None = None
    """the `result.json` of an evaluation of pictures that it made"""


def write_card(uri: str, changes: CardFacts | None = None, *, dry_run: bool = False) -> str:
    """Writes the card of the bundle at `uri`, and returns its address.

    Args:
        changes: what is to be said from now on; fields that are null stay as they are.
        dry_run: whether nothing is written, only all that is read checked.

    Raises `BundleError` where the bundle or its `card.json` cannot be read.
    """
    uri = storage.absolute(uri)
    facts = _stored_facts(uri)
    if changes is not None:
        given = {name: value for name, value in changes.to_dict().items() if value is not None}
        facts = CardFacts.from_dict({**facts.to_dict(), **given})
    card, bundle = storage.join(uri, CARD_FILE), Bundle.load(uri)
    if dry_run:
        return card
    if changes is not None:
        storage.write_bytes(storage.join(uri, FACTS_FILE), facts.to_json().encode())
    while True:  # until nothing else was exported beside it while it was written
        storage.write_bytes(card, model_card(bundle, facts).encode())
        written, bundle = bundle, Bundle.load(uri)
        if bundle.manifests == written.manifests:
            return card


def model_card(bundle: Bundle, facts: CardFacts) -> str:
    """The whole file: the hub's front matter (YAML), then Markdown. Text from elsewhere is escaped."""
    sections = (
        _front_matter(bundle, facts),
        _introduction(bundle),
        _use(bundle),
        _stages(bundle),
        _data(bundle),
        _clip(bundle),
        _evaluation(bundle, facts),
        _licence(bundle, facts),
        _configurations(bundle),
    )
    return "\n".join(line for section in sections for line in (*section, ""))


def _stored_facts(uri: str) -> CardFacts:
    path = storage.join(uri, FACTS_FILE)
    if not storage.exists(path):
        return CardFacts()
    try:
        return CardFacts.from_dict(storage.read_json(path))
    except (ConfigError, ValueError, TypeError) as error:
        raise BundleError(f"{path!r}: {error}") from None


def _front_matter(bundle: Bundle, facts: CardFacts) -> Iterator[str]:
    yield "---"
    yield "library_name: unclip"
    if "decoder" in bundle.configs:
        yield f"pipeline_tag: {'text-to-image' if _takes_captions(bundle) else 'unconditional-image-generation'}"
    yield f"license: {facts.licence or _NO_LICENCE}"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("unclip", "dall-e-2", "diffusion"))
    yield "---"


def _introduction(bundle: Bundle) -> Iterator[str]:
    yield "# A model of the DALL·E 2 kind (unCLIP)"
    yield ""
    sizes = [f"{size} × {size}" for size in _sizes(bundle)]
    if sizes:
        told = "captions" if _takes_captions(bundle) else "classes"
        yield f"It makes pictures of {told}, {' and '.join(sizes)} pixels, in the stages of {_PAPER}."
    else:
        yield f"It has stages of {_PAPER}, but no decoder, so it makes no pictures yet."


def _use(bundle: Bundle) -> Iterator[str]:
    if "decoder" not in bundle.configs:
        return
    prompt = "a drawing of a red circle" if _takes_captions(bundle) else _classes(bundle)[0]
    yield "## Use"
    yield ""
    yield from _fenced(
        "python",
        "from unclip.pipelines.pipeline import Pipeline\n\n"
        'pipeline = Pipeline.from_bundle("hf-hub:ORG/NAME")  # or the path of this folder, or s3://…\n'
        f"pictures = pipeline([{json.dumps(prompt)}], seeds=[0]).images  # by side in pixels: uint8 (1, side, side, 3)",
    )


def _stages(bundle: Bundle) -> Iterator[str]:
    rows = [
        (
            name,
            _STAGES[name],
            f"{_parameters(bundle.configs[name]) / 1e6:,.2f}M",
            _text(manifest.provenance.get("recipe", "")),
            _count(manifest.provenance.get("step")),
            _count(manifest.provenance.get("samples_seen")),
            _text(_origin(manifest)),
        )
        for name, manifest in bundle.manifests.items()
    ]
    yield "## Stages"
    yield ""
    yield from _table(("stage", "what it does", "parameters", "recipe", "steps", "samples seen", "from"), rows)
    for name, manifest in bundle.manifests.items():
        dropped = manifest.provenance.get("dropped")
        for what, reason in dropped.items() if isinstance(dropped, Mapping) else ():
            yield ""
            yield f"Not taken over into {name}: {_text(what)} ({_text(reason)})."


def _data(bundle: Bundle) -> Iterator[str]:
    rows = [
        (
            stage,
            _text(source.get("name", "")),
            _count(source.get("rows")),
            _count(source.get("samples")),
            _text(source.get("licence") or "not stated"),
        )
        for stage, manifest in bundle.manifests.items()
        for source in _list(manifest.provenance.get("data"))
        if isinstance(source, Mapping)
    ]
    yield "## Data"
    yield ""
    if rows:
        yield from _table(("stage", "records", "rows", "samples trained on", "licence"), rows)
    else:
        yield "Its files do not say what it was trained on."


def _clip(bundle: Bundle) -> Iterator[str]:
    if bundle.clip is None:
        return
    yield "## CLIP"
    yield ""
    source = bundle.clip.source
    if "clip" in bundle.configs:
        which = "the one in this folder"
    elif source.startswith("/") or "://" in source:  # somebody's own folder
        which = "one that is not in this folder"
    else:
        which = _text(source)
    yield f"Embeddings are those of a CLIP, {which}, of fingerprint `{bundle.clip.fingerprint}`."


def _evaluation(bundle: Bundle, facts: CardFacts) -> Iterator[str]:
    yield "## Evaluation"
    yield ""
    if facts.evaluation is None:
        yield "None was stated."
        return
    result = facts.evaluation
    made_by = _at(result, "protocol", "pictures", "made_by", "bundle")
    if made_by is not None and made_by != bundle.digest:
        yield "**Of an earlier state of this bundle**, whose weights or configuration were others."
        yield ""
    rows = [(_text(name), _number(value)) for name, value in _numbers(result.get("metrics"))]
    yield f"Of {_count(result.get('pictures'))} pictures; the protocol, with all that decides the numbers, is in `{FACTS_FILE}`."
    yield ""
    yield from _table(("metric", "value"), rows)


def _licence(bundle: Bundle, facts: CardFacts) -> Iterator[str]:
    yield "## Licence and attribution"
    yield ""
    yield (
        f"Licence of the weights: {facts.licence}."
        if facts.licence
        else "No licence of the weights is stated; those of the data are in the table above, where they are known."
    )
    yield ""
    said = [text for manifest in bundle.manifests.values() for text in _list(manifest.provenance.get("attributions"))]
    for text in dict.fromkeys(map(str, said)):
        yield f"- {_text(text)}"


def _configurations(bundle: Bundle) -> Iterator[str]:
    yield "## Configuration"
    yield ""
    yield f"Digest of the bundle: `{bundle.digest}`."
    for name, manifest in bundle.manifests.items():
        parts = {"stage": bundle.configs[name].to_dict(), "training": manifest.provenance.get("training")}
        for what, content in parts.items():
            if content is None:
                continue
            yield ""
            yield f"<details><summary>{name}: {what}</summary>"
            yield ""
            yield from _fenced("json", json.dumps(_shortened(content), indent=2, ensure_ascii=False))
            yield ""
            yield "</details>"


def _origin(manifest: StageManifest) -> str:
    converted = manifest.provenance.get("source")
    return (
        f"converted from {str(converted).rsplit('/', 1)[-1]}"
        if converted
        else "trained here"
        if "run" in manifest.provenance
        else ""
    )


def _sizes(bundle: Bundle) -> list[int]:
    return sorted(
        config.image_size
        for config in bundle.configs.values()
        if isinstance(config, DecoderStageConfig | UpsamplerStageConfig) and "decoder" in bundle.configs
    )


def _takes_captions(bundle: Bundle) -> bool:
    return not _classes(bundle)


def _classes(bundle: Bundle) -> Sequence[str]:
    decoder = bundle.configs.get("decoder")
    return decoder.classes if isinstance(decoder, DecoderStageConfig) else ()


def _parameters(config: StageConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in nested objects, under dotted names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _shortened(value: object) -> object:
    """Long lists (tables of a value a timestep, names of a thousand classes) by their first entries and their number."""
    if isinstance(value, Mapping):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list) and len(value) > 16:
        return [*value[:4], f"… {len(value)} in all"]
    return [_shortened(part) for part in value] if isinstance(value, list) else value


def _at(value: object, *path: str) -> object:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if math.isfinite(value) else str(value)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _fenced(language: str, text: str) -> Iterator[str]:
    """A block of code, whose fence is longer than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    yield f"{fence}{language}"
    yield text
    yield fence


def _text(value: object) -> str:
    """Text from elsewhere as Markdown that shows just that, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))
