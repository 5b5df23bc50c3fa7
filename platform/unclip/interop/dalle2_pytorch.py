"""dalle2-pytorch (lucidrains/DALLE2-pytorch): its training configurations as settings for our jobs; its weights are refused.

Its networks are others: a SwiGLU transformer with relative attention bias for the prior, U-Nets with linear and cross
attention for decoder and upsamplers. No map of names makes their weights compute anything here. What has the same meaning is
taken over, under our names, as a file for `--config`; whatever has not is named with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from unclip.interop.keys import Account, InteropError
from unclip.utils import storage

_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
_STAGE, _MODEL, _UNET = "objective.stage", "objective.stage.model", "objective.stage.model.unet"
_DEFAULT_TEXT_LENGTH = 256
_NO_COUNTERPART = "has no counterpart here"
_REASONS = {
    "ff_mult": "ours is 4",
    "rotary_emb": "ours has learned positions",
    "normformer": "ours is a plain pre-norm transformer",
    "norm_in": "ours is a plain pre-norm transformer",
    "attn_dropout": "our prior drops nothing",
    "ff_dropout": "our prior drops nothing",
    "num_time_embeds": "ours is 1",
    "num_image_embeds": "ours is 1",
    "num_text_embeds": "ours is 1",
    "cond_dim": "our context is as wide as its text transformer, or as the time embedding",
    "attn_heads": "our heads are as many as attn_dim_head fit into a level's width",
    "epochs": "ours is loop.max_steps",
    "amp": "ours is zero.precision",
    "use_ema": "ours always exports the average",
    "image_size": "of its CLIP, which knows it",
    "best_validation_loss": "state of a run",
    "current_epoch": "state of a run",
    "num_samples_seen": "state of a run",
}


def convert_settings(source: str, out: str, *, dry_run: bool) -> Account:
    """Writes the settings for `jobs/train_prior.py` or `jobs/train_decoder.py` that `source` means to `out`, as YAML."""
    part, settings, account = read_settings(Path(source))
    if not dry_run:
        head = (
            f"# From dalle2-pytorch's {Path(source).name}: python jobs/train_{part}.py --recipe small --config FILE\n"
        )
        storage.write_bytes(out, (head + yaml.safe_dump(settings, sort_keys=False)).encode())
    return account


def read_settings(path: Path) -> tuple[str, dict[str, Any], Account]:
    """(`prior` or `decoder`, nested settings under our names, what became of every field) of a training configuration.

    Raises `InteropError` for anything else, weights among it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise InteropError(
            f"{str(path)!r}: only dalle2-pytorch's configurations (JSON) are taken over. Its weights fit no network of ours: its "
            "prior has a SwiGLU transformer with relative attention bias, its U-Nets linear and cross attention"
        ) from None
    parts = [name for name in ("prior", "decoder") if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if len(parts) != 1:
        raise InteropError(f"{str(path)!r}: expected a training configuration with the section prior or decoder")
    fields = _Fields(content)
    (_prior if parts[0] == "prior" else _decoder)(fields)
    _training(fields)
    left = {name: _REASONS.get(name.rsplit(".", 1)[-1], _NO_COUNTERPART) for name in fields.rest}
    account = Account(
        f"dalle2-pytorch's {parts[0]} configuration",
        taken=fields.taken,
        made=len(fields.ours),
        dropped=fields.left | left,
        what="fields",
    )
    return parts[0], fields.nested(), account


class _Fields:
    """The fields of a configuration by dotted names, which are taken one by one."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.rest = dict(_leaves(content))
        self.ours: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        self.taken = 0

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, which is accounted for by that; the default where it is not there or null."""
        if name not in self.rest:
            return default
        value = self.rest.pop(name)
        self.taken += 1
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> Any:
        """The same of a field that must be a number, and be there where there is no default."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InteropError(f"{name} = {value!r}: must be a number")
        return value

    def rename(self, name: str, ours: str) -> None:
        """Where the field is there, ours is that."""
        value = self.take(name)
        if value is not None:
            self.ours[ours] = value

    def leave(self, name: str, reason: str) -> None:
        """A field that was taken, but says something that is not taken over."""
        self.taken -= 1
        self.left[name] = reason

    def nested(self) -> dict[str, Any]:
        """Our fields, as nested as `--config` has them."""
        found: dict[str, Any] = {}
        for name, value in self.ours.items():
            *path, last = name.split(".")
            place = found
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return found


def _prior(fields: _Fields) -> None:
    dim = fields.number("prior.net.dim")
    embed_dim = fields.number("prior.image_embed_dim", dim)
    heads, head_width = fields.number("prior.net.heads", 8), fields.number("prior.net.dim_head", 64)
    fields.ours |= {f"{_MODEL}.embed_dim": embed_dim, f"{_MODEL}.width": dim}
    if heads * head_width == dim:
        fields.ours[f"{_MODEL}.heads"] = heads
    else:
        fields.leave("prior.net.heads", f"{heads} heads of {head_width} are not its width {dim}, as ours have to be")
    fields.rename("prior.net.depth", f"{_MODEL}.depth")
    fields.ours[f"{_MODEL}.context_length"] = fields.take("prior.net.max_text_len", _DEFAULT_TEXT_LENGTH)
    timesteps = fields.number("prior.timesteps", 1000)
    if fields.take("prior.net.num_timesteps", timesteps) != timesteps:
        fields.leave("prior.net.num_timesteps", f"is not timesteps = {timesteps}")
    fields.ours[f"{_STAGE}.diffusion.num_train_timesteps"] = timesteps
    _schedule(fields, "prior.beta_schedule", fields.take("prior.beta_schedule", "cosine"))
    fields.ours[f"{_STAGE}.diffusion.prediction_type"] = _prediction(fields, "prior", sample=True)
    _loss(fields, "prior.loss_type")
    _sampling(fields, fields.number("prior.sample_timesteps", timesteps), timesteps)
    fields.ours["objective.text_drop_prob"] = fields.take("prior.cond_drop_prob", 0.0)
    if not fields.take("prior.condition_on_text_encodings", True):
        fields.leave("prior.condition_on_text_encodings", "our prior always sees the caption")
    scale = fields.number("prior.image_embed_scale", embed_dim**0.5)
    fields.left["image_embed_scale"] = (
        f"there unit-norm embeddings are diffused times {scale:.6g}, which is a normalizer of mean 0 and std {1 / scale:.6g}; a "
        "run of ours fits its normalizer by objective.normalization"
    )
    _clip(fields, "prior.clip")
    fields.rename("data.batch_size", "loop.microbatch_size")


def _decoder(fields: _Fields) -> None:
    unets = fields.take("decoder.unets", [])
    if not unets or not all(isinstance(unet, dict) for unet in unets):
        raise InteropError(f"decoder.unets = {unets!r}: must be a list of U-Nets")
    for name, kind in (("dim", int), ("dim_mults", list)):
        if not isinstance(unets[0].get(name), kind):
            raise InteropError(f"decoder.unets.0.{name} = {unets[0].get(name)!r}: must be {kind.__name__}")
    first, sizes = dict(unets[0]), fields.take("decoder.image_sizes") or [fields.take("decoder.image_size", 64)]
    size, learned = sizes[0], _first(fields.take("decoder.learned_variance", True))
    attends = first.pop("self_attn", False)
    levels = len(first["dim_mults"])
    flags = attends if isinstance(attends, list) else [attends] * levels
    channels = first.pop("channels", 3)
    fields.ours |= {
        f"{_STAGE}.image_size": size,
        f"{_UNET}.image_size": size,
        f"{_UNET}.channels": first.pop("dim"),
        f"{_UNET}.channel_mult": first.pop("dim_mults"),
        f"{_UNET}.attention_resolutions": [size >> level for level, flag in enumerate(flags) if flag]
        or [size >> (levels - 1)],
        f"{_UNET}.head_channels": first.pop("attn_dim_head", 32),
        f"{_UNET}.out_channels": channels * (2 if learned else 1),
        f"{_STAGE}.diffusion.variance_type": "learned_range" if learned else "fixed_small",
    }
    embed_dim = first.pop("image_embed_dim", None)
    if embed_dim is not None:
        fields.ours[f"{_MODEL}.embed_dim"] = embed_dim
    if not first.pop("cond_on_text_encodings", False):
        fields.ours[f"{_MODEL}.text"] = None
    else:
        fields.left["decoder.unets.0.cond_on_text_encodings"] = "ours has a text transformer of its own, or text_states"
    if not any(flags):
        fields.left["decoder.unets.0.self_attn"] = "without attention ours would not see z_i: its lowest level has some"
    for name in first:
        fields.left[f"decoder.unets.0.{name}"] = _REASONS.get(name, _NO_COUNTERPART)
    for index in range(1, len(unets)):
        fields.left[f"decoder.unets.{index}"] = "our upsamplers are stages of their own, convolutions alone"
    timesteps = fields.number("decoder.timesteps", 1000)
    fields.ours[f"{_STAGE}.diffusion.num_train_timesteps"] = timesteps
    _schedule(fields, "decoder.beta_schedule", _first(fields.take("decoder.beta_schedule", "cosine")))
    _loss(fields, "decoder.loss_type")
    fields.ours[f"{_STAGE}.diffusion.prediction_type"] = _prediction(fields, "decoder", sample=False)
    _sampling(fields, _first(fields.take("decoder.sample_timesteps")) or timesteps, timesteps)
    fields.ours["objective.image_drop_prob"] = fields.take("decoder.image_cond_drop_prob", 0.1)
    fields.ours["objective.text_drop_prob"] = fields.take("decoder.text_cond_drop_prob", 0.5)
    fields.take("decoder.channels", 3)
    _clip(fields, "decoder.clip")
    fields.rename("data.batch_size", "loop.microbatch_size")


def _prediction(fields: _Fields, part: str, *, sample: bool) -> str:
    """What the network predicts, of a decoder the first; `sample` is whether that is the clean sample by default."""
    velocity = _first(fields.take(f"{part}.predict_v", False))
    sample = _first(fields.take(f"{part}.predict_x_start", sample))
    return "v_prediction" if velocity else "sample" if sample else "epsilon"


def _training(fields: _Fields) -> None:
    for name, ours in {
        "lr": "optimizer.learning_rate",
        "wd": "optimizer.weight_decay",
        "max_grad_norm": "optimizer.grad_clip",
        "ema_beta": "optimizer.ema_decay",
        "warmup_steps": "optimizer.warmup_steps",
        "random_seed": "seed",
    }.items():
        value = _first(fields.take(f"train.{name}"))
        if value is not None:
            fields.ours[ours] = value
    if "loop.microbatch_size" in fields.ours:
        fields.left["global batch"] = "there it is data.batch_size times the GPUs; ours is loop.global_batch_size"


def _schedule(fields: _Fields, name: str, value: str) -> None:
    if value in _SCHEDULES:
        fields.ours[f"{_STAGE}.diffusion.beta_schedule"] = _SCHEDULES[value]
    else:
        fields.leave(name, f"{value!r} is no schedule of ours")


def _loss(fields: _Fields, name: str) -> None:
    if fields.take(name, "l2") != "l2":
        fields.leave(name, "ours is the mean square")


def _sampling(fields: _Fields, steps: int, timesteps: int) -> None:
    """Fewer steps than it was trained with are DDIM's there."""
    fields.ours[f"{_STAGE}.sampling.num_inference_steps"] = steps
    fields.ours[f"{_STAGE}.sampling.sampler"] = "ddim" if steps < timesteps else "ddpm"


def _clip(fields: _Fields, name: str) -> None:
    make, model = fields.take(f"{name}.make"), fields.take(f"{name}.model")
    if make == "openai" and model is not None:
        fields.ours["clip"] = f"{model.replace('/', '-')}-quickgelu/openai"
    elif make is not None:
        fields.leave(f"{name}.make", f"{make!r}: name the CLIP as open_clip does, in clip")


def _first(value: Any) -> Any:
    """Of a setting that there may be one of for each U-Net, the first's."""
    return value[0] if isinstance(value, list) and value else value


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from _leaves(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part
