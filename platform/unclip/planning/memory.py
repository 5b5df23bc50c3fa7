"""Memory of one worker by part, for every ZeRO stage and offload (Rajbhandari et al. 2020 and 2021), as our engine has it.

P parameters, N workers; w bytes of a weight that computes: 2 in bf16, else 4. What is updated is float32 always.

| | stage 0 | 1 | 2 | 3 |
|---|---|---|---|---|
| weights | wP | wP | wP | wP/N |
| gradients, backward pass | wP | wP | wP/N | wP/N |
| optimizer: float32 weights, two moments | 8P | 12P/N | 12P/N | 12P/N |
| moving average | 4P | 4P/N | 4P/N | 4P/N |

Besides activations there are DeepSpeed's buffers (0.19.8): the bucket in which gradients travel, one for each float type; at
stage 3 a copy of it for the reduce-scatter, and the gathered weights of the layers at work; and in the update the gradients
once more, flat and in float32. One worker alone has nobody to share with: where it can, our engine takes stage 0 for it, and
nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from unclip.planning.network import Network
from unclip.training.engine import LARGEST_BUCKET, ZeroConfig, for_group

PARTS = ("weights", "gradients", "optimizer", "ema", "activations", "buffers", "framework")
"""Of a device's memory, in the order of tables."""

CONTEXT_BYTES = 1.5 * 2**30
"""Assumed: what CUDA, NCCL and the libraries' workspaces take of a GPU before the first tensor."""

_GATHERED = 1_050_000_000
"""Elements: DeepSpeed's stage 3 keeps at most 10^9 parameters gathered, and fetches 5 10^7 ahead."""
_WHOLE_GRADIENT = 500_000_000
"""Elements that stage 0 exchanges at once."""
_SWAPPED = 5 * 50_000_000
"""Elements of state in host memory at once where it lies on disk."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. device: by `PARTS` at its fullest moment. host: page-locked memory by part. disk: bytes.

    `moment` says which moment of a step is the fullest: backward or update.
    """

    device: Parts
    moment: str
    host: Parts = field(default_factory=dict)
    disk: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class Shape:
    """How a run is cut up: ZeRO's configuration, workers, samples of a micro-batch, micro-batches of a step."""

    zero: ZeroConfig
    workers: int
    microbatch: int
    accumulation: int = 1


def worker_memory(network: Network, shape: Shape, *, lazy: bool = False) -> Memory:
    """The memory of one worker's GPU.

    With `lazy`, of a worker on CPUs, where the pages of a buffer count as it fills, offloaded state lies beside the rest
    and there is no context: its resident size beyond a bare process.
    """
    shape = replace(shape, zero=for_group(shape.zero, shape.workers))
    state, away = _state(network, shape)
    moments = {
        "backward": _backward_lazily(network, shape) if lazy else _backward(network, shape),
        "exchange": _exchange(network, shape),
        "update": _update(network, shape),
    }
    moment, fullest = max(moments.items(), key=lambda item: sum(item[1].values()))
    host = _host(network, shape, away)
    taken = state | fullest
    if lazy:
        taken = {name: taken.get(name, 0.0) + host.get(name, 0.0) for name in PARTS}
    device = {name: taken.get(name, 0.0) for name in PARTS} | {"framework": 0.0 if lazy else CONTEXT_BYTES}
    disk = sum(away.values()) if shape.zero.offload_optimizer == "nvme" else 0.0
    return Memory(device, moment, host, disk)


def weight_bytes(zero: ZeroConfig) -> int:
    """Bytes of a weight that computes, and of its gradient."""
    return 2 if zero.precision == "bf16" else 4


def _state(network: Network, shape: Shape) -> tuple[Parts, Parts]:
    """What is there throughout a step, on the device and away from it."""
    zero, parameters = shape.zero, network.parameters
    shard = parameters / (shape.workers if zero.stage else 1)
    weights = weight_bytes(zero) * (shard if zero.stage == 3 else parameters)
    updated = {"optimizer": (12 if zero.stage else 8) * shard, "ema": 4 * shard}
    here = {} if zero.offload_optimizer != "none" else updated
    away = updated if zero.offload_optimizer != "none" else {}
    if zero.offload_parameters != "none":
        return here, away | {"weights": weights}
    return here | {"weights": weights}, away


def _backward(network: Network, shape: Shape) -> Parts:
    """What the forward and backward pass adds at its fullest moment, every buffer in full from the first gradient on."""
    zero, whole = shape.zero, weight_bytes(shape.zero) * network.parameters
    buffers = _bucket(network, zero) + _gathered(network, zero)
    if zero.stage >= 2:
        peak = network.step.peak(shape.microbatch, kept=0.0)
        buffers += _copies(network, shape)  # buckets are exchanged while the backward pass goes on
        return {"activations": peak.activations, "gradients": _partition(network, shape), "buffers": buffers}
    if shape.accumulation > 1:  # the gradients of the micro-batches before are there throughout
        peak = network.step.peak(shape.microbatch, kept=0.0)
        return {"activations": peak.activations, "gradients": whole, "buffers": buffers}
    peak = network.step.peak(shape.microbatch, kept=1.0)
    return {"activations": peak.activations, "gradients": peak.gradients, "buffers": buffers}


def _backward_lazily(network: Network, shape: Shape) -> Parts:
    """The same where the bucket's pages come with the gradients that are put there."""
    zero, whole = shape.zero, weight_bytes(shape.zero) * network.parameters
    if shape.accumulation > 1 and zero.stage < 2:
        return _backward(network, shape) | {"buffers": 0.0}
    bucket = _bucket(network, zero) if zero.stage >= 2 else 0.0
    arriving = bucket / whole if zero.stage >= 2 else 1.0
    peak = network.step.peak(shape.microbatch, kept=arriving)
    filled = bucket * peak.gradients / (arriving * whole)
    # Stage 3 adds gradients up in a buffer of its own, which stays when it has been read.
    kept = _partition(network, shape) if zero.stage == 3 or shape.accumulation > 1 else 0.0
    gradients = peak.gradients if zero.stage < 2 else kept
    return {"activations": peak.activations, "gradients": gradients, "buffers": filled + _gathered(network, zero)}


def _exchange(network: Network, shape: Shape) -> Parts:
    """What there is while the last bucket of gradients is exchanged; activations are gone."""
    zero, whole = shape.zero, weight_bytes(shape.zero) * network.parameters
    if zero.stage == 0:
        copied = min(network.parameters, _WHOLE_GRADIENT) if shape.workers > 1 else 0
        return {"gradients": whole, "buffers": float(weight_bytes(zero) * copied)}
    buffers = _copies(network, shape) + _gathered(network, zero)
    if zero.stage == 1:  # gradients move into the bucket
        return {"gradients": whole, "buffers": buffers}
    buffers += _bucket(network, zero)
    own = _partition(network, shape)
    if zero.stage == 3:
        return {"gradients": own, "buffers": buffers}
    if shape.accumulation == 1:
        return {"gradients": 0.0, "buffers": buffers}
    return {"gradients": own, "buffers": max(buffers, _bucket(network, zero) + own)}  # the sum, and what is added to it


def _update(network: Network, shape: Shape) -> Parts:
    """What the optimizer's step adds: the gradients once more, flat and in float32."""
    zero = shape.zero
    if zero.stage == 0 or zero.offload_optimizer != "none":
        return {}
    kept = _bucket(network, zero) + _gathered(network, zero) if zero.stage == 3 else 0.0
    return {"gradients": _partition(network, shape), "buffers": 4 * network.parameters / shape.workers + kept}


def _partition(network: Network, shape: Shape) -> float:
    """The sum of gradients that this worker keeps on its device."""
    if shape.zero.offload_optimizer != "none":
        return 0.0
    return weight_bytes(shape.zero) * network.parameters / shape.workers


def _bucket(network: Network, zero: ZeroConfig) -> float:
    """Where gradients gather before they are exchanged, one for each float type; stage 0 has none."""
    return 0.0 if zero.stage == 0 else sum(own * size for own, _, size in _bucket_types(network, zero))


def _copies(network: Network, shape: Shape) -> float:
    """Copies of gradients while a bucket is exchanged, and then on their way to the host where they are offloaded.

    Of the bucket, one type after the other: in the order of ranks, and in the type that travels; at stage 3 also this
    worker's part of the sum. Before stage 3 parameters go to the host one by one, through a buffer that stays, and what
    there is of them here is taken once more in float64 for its norm.
    """
    zero = shape.zero
    travelling, part = 0.0, 1 / shape.workers if zero.stage == 3 else 0.0
    if shape.workers > 1 and zero.stage > 0:
        travelling = max((own + other + own * part) * size for own, other, size in _bucket_types(network, zero))
    if zero.offload_optimizer == "none" or zero.stage == 3:
        return travelling
    leaving = 8.0 * min(network.largest, network.parameters / shape.workers)
    return weight_bytes(zero) * network.largest + max(travelling, leaving)


def _bucket_types(network: Network, zero: ZeroConfig) -> list[tuple[int, int, float]]:
    """Of each bucket the bytes of an element, those of an element in a second type that travels, and the elements."""
    if zero.precision != "autocast":
        return [(weight_bytes(zero), 0, min(LARGEST_BUCKET, network.parameters))]
    low, rest = network.low_parameters, network.parameters - network.low_parameters
    low_type = (2, 0) if zero.stage == 3 else (4, 2)
    return [(*low_type, min(LARGEST_BUCKET, low)), (4, 0, min(LARGEST_BUCKET, rest))]


def _gathered(network: Network, zero: ZeroConfig) -> float:
    """Stage 3: whole weights of the layers at work and of those to come."""
    if zero.stage < 3:
        return 0.0
    low = network.low_parameters if zero.precision == "autocast" else 0
    average = weight_bytes(zero) - 2 * low / network.parameters
    return average * min(network.parameters, _GATHERED)


def _host(network: Network, shape: Shape, away: Parts) -> Parts:
    """Page-locked host memory of one worker: what is offloaded to it, and a checkpoint's copy on its way to storage."""
    zero, shard = shape.zero, network.parameters / shape.workers
    host: Parts = {"snapshot": 16 * shard}
    if zero.offload_optimizer == "none":
        return host
    on_disk = zero.offload_optimizer == "nvme"
    # Gradients as they come from the device, and as the update takes them; before stage 3, weights on their way back,
    # and stage 2 adds up the gradients of several micro-batches there.
    copies = weight_bytes(zero) * shard
    passing = weight_bytes(zero) * network.largest + copies if zero.stage < 3 else 4.0 * network.largest
    host |= {"buffers": 4.0 * _SWAPPED if on_disk else passing}
    added_up = 4 * shard if zero.stage == 2 and shape.accumulation > 1 else 0.0
    host |= {"gradients": 4 * shard + added_up + (copies if zero.stage == 3 else 0.0)}
    return host | ({} if on_disk else away)
