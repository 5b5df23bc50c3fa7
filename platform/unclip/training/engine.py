"""One module trained by DeepSpeed ZeRO (Rajbhandari et al. 2020) on gloo or NCCL, behind four methods.

`autocast` means float32 weights and `torch.autocast` at every stage, by DeepSpeed's `torch_autocast`: matrix products
and convolutions compute in bfloat16, their gradients (stages 1-3) and gathered weights (stage 3) also travel in
bfloat16, while the weights of norms, sums of gradients, moments and the moving average stay float32.

`bf16` means that the module's weights, its gradients and what travels of both are bfloat16; each rank's shard of the
state that is updated (weights, moments, moving average) is float32.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from pydantic import model_validator
from torch import nn

from unclip.config.base import Config
from unclip.training.offload import (
    Offload,
    SwapFolder,
    keep_gradients_in_memory,
    offload_settings,
    require_disk_operator,
)
from unclip.training.optim import EmaAdamW, OptimizerConfig, ema_decay_at

LARGEST_BUCKET = 100_000_000
"""Elements reduced or gathered at once. DeepSpeed's own 500 million would set 2 GB aside for any model."""

Precision = Literal["fp32", "autocast", "bf16"]
"""What a step computes in, see above."""


class ZeroConfig(Config):
    """How DeepSpeed spreads the training state over the workers, and in which precision it computes."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded: 0 nothing, 1 moments and averages, 2 gradients as well, 3 weights as well."""
    precision: Precision = "autocast"
    """autocast: matrix products and convolutions in bfloat16, weights float32. bf16: the weights that compute, and their
    gradients, in bfloat16 too, which needs stage 1 or more. Updated weights, moments and averages are always float32."""
    offload_optimizer: Offload = "none"
    """Where the updated weights, moments and averages lie; cpu needs stage 1 or more, nvme stage 3."""
    offload_parameters: Offload = "none"
    """Where sharded weights lie between their uses; needs stage 3."""
    nvme_path: str | None = None
    """Local folder on a fast disk, on every node, for what is offloaded to nvme."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "bf16" and self.stage == 0:
            raise ValueError(
                "zero.precision = 'bf16' keeps float32 weights in shards: zero.stage must be 1, 2 or 3, not 0"
            )
        needed = {"none": 0, "cpu": 1, "nvme": 3}[self.offload_optimizer]
        if self.stage < needed:
            raise ValueError(
                f"zero.offload_optimizer = {self.offload_optimizer!r} needs zero.stage {needed} or more, not {self.stage}"
            )
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(
                f"zero.offload_parameters = {self.offload_parameters!r} needs sharded weights: zero.stage must be 3, "
                f"not {self.stage}"
            )
        if self.offload_parameters == "nvme" and self.precision != "bf16":
            raise ValueError(f"zero.offload_parameters = 'nvme' needs zero.precision = 'bf16', not {self.precision!r}")
        if self.swaps and (self.nvme_path is None or "://" in self.nvme_path):
            raise ValueError(f"offload to 'nvme' needs zero.nvme_path to be a local folder, not {self.nvme_path!r}")
        return self

    @property
    def swaps(self) -> bool:
        """Whether a disk is used."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


class HasLoss(Protocol):
    """Anything with the scalar loss of a micro-batch."""

    @property
    def loss(self) -> torch.Tensor: ...


Output = TypeVar("Output", bound=HasLoss)


class _Call(nn.Module):
    """What DeepSpeed sees as the model: its forward is any function that calls the trained module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        return function()


class Engine:
    """DeepSpeed around one module.

    A step is `accumulation_steps` times `forward` and `backward`, then `step`. Gradients are means over micro-batches
    and workers. All ranks start from the weights of rank 0. The process group that exists is used; where there is none,
    this process becomes a group of one.

    Attributes:
        module: the trained module, on `device`. At stage 3 its weights exist only inside `forward`.
        stage: what is sharded; a single process shards nothing, so that stages 1 and 2 may be 0 there.
        optimizer: holds the float32 weights that are updated, their moments and moving averages.
        steps: optimizer steps applied.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_config: OptimizerConfig,
        zero_config: ZeroConfig,
        *,
        microbatch_size: int,
        accumulation_steps: int,
        device: torch.device,
    ) -> None:
        _check_trainable(module)
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]  # exported, but not in so many words
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        zero_config = for_group(zero_config, self.world_size)
        self.stage: int = zero_config.stage
        self.module = module.to(device)
        for parameter in module.parameters():  # ZeRO flattens; fragments are 1-D views at stage 0 too
            parameter.data = parameter.data.contiguous()
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.optimizer: EmaAdamW = optimizer_config.build(module)
        self.steps = 0
        self._config = optimizer_config
        self._swap_folder = _swap_folder(zero_config)
        settings = _settings(optimizer_config, zero_config, sum(p.numel() for p in self.names), accumulation_steps)
        settings["train_micro_batch_size_per_gpu"] = microbatch_size
        settings["zero_optimization"] |= offload_settings(
            module,
            optimizer=zero_config.offload_optimizer,
            parameters=zero_config.offload_parameters,
            folder=self._swap_folder.path if self._swap_folder else None,
            world_size=self.world_size,
        )
        self._deepspeed, self.zero_optimizer, _, _ = deepspeed.initialize(
            model=_Call(module), optimizer=self.optimizer, config=settings
        )
        if self.world_size == 1 and self.stage == 0:
            self._deepspeed.enable_backward_allreduce = False  # it would copy all gradients twice for nobody
        if zero_config.offload_optimizer == "nvme":
            keep_gradients_in_memory(self.zero_optimizer.optimizer_swapper)

    @property
    def is_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its optimizer step."""
        return bool(self._deepspeed.is_gradient_accumulation_boundary())

    def forward(self, compute: Callable[[], Output]) -> Output:
        """Runs `compute`, which may call the module and returns an object with the micro-batch's `loss`."""
        outputs: list[Output] = []

        def loss() -> torch.Tensor:
            outputs.append(compute())
            return outputs[0].loss

        self._deepspeed(loss)
        return outputs[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's mean loss; the last one of a step also exchanges them."""
        self._deepspeed.backward(loss)
        if not self.is_accumulation_boundary:
            self._deepspeed.step()  # only counts the micro-batch

    def step(self, learning_rate: float) -> float:
        """Clips, updates weights and moving averages, clears gradients; returns the gradient's norm before clipping.

        Where the norm is not finite nothing is updated, `steps` does not count it, and the answer is infinity.
        Raises `RuntimeError` where micro-batches of the step are missing.
        """
        if not self.is_accumulation_boundary:
            raise RuntimeError("step() came before backward() of all micro-batches of the step")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["ema_decay"] = ema_decay_at(self.steps, self._config)
        norm = self._replicated_step() if self.stage == 0 else self._sharded_step()
        self.steps += math.isfinite(norm)
        return norm

    def _sharded_step(self) -> float:
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm()) if self._deepspeed.was_step_applied() else math.inf

    def _replicated_step(self) -> float:
        """Stage 0: DeepSpeed hands the update to the optimizer itself, tells no norm and skips nothing."""
        gradients = [p.grad for p in self.names if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.module.zero_grad()  # without gradients nothing is updated
        elif self._config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.names, self._config.grad_clip, torch.tensor(norm, device=self.device))
        self._deepspeed.step()
        return norm if math.isfinite(norm) else math.inf


def _settings(optimizer: OptimizerConfig, zero: ZeroConfig, parameters: int, accumulation_steps: int) -> dict[str, Any]:
    bucket = min(LARGEST_BUCKET, parameters + parameters % 2)  # DeepSpeed wants it even
    # Shards can hold sums of bfloat16 gradients in float32; at stage 1 DeepSpeed changes to another optimizer for that.
    sums = "fp32" if zero.precision == "bf16" and zero.stage > 1 and accumulation_steps > 1 else None
    return {
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": optimizer.grad_clip if zero.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": zero.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "torch_autocast": {"enabled": zero.precision == "autocast", "dtype": "bfloat16"},
        "bf16": {"enabled": zero.precision == "bf16"},
        "data_types": {"grad_accum_dtype": sums},
    }


def for_group(zero: ZeroConfig, world_size: int) -> ZeroConfig:
    """One process has nobody to share state with: stages 1 and 2 are stage 0 there, without their copies of gradients."""
    shards_nothing = (
        world_size == 1 and zero.stage < 3 and zero.precision != "bf16" and zero.offload_optimizer == "none"
    )
    return zero.model_copy(update={"stage": 0}) if shards_nothing else zero


def _swap_folder(zero: ZeroConfig) -> SwapFolder | None:
    if not zero.swaps:
        return None
    require_disk_operator()
    assert zero.nvme_path is not None
    return SwapFolder(zero.nvme_path)


def _check_trainable(module: nn.Module) -> None:
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(f"every parameter of a trained module must be trained; frozen: {', '.join(frozen[:5])}")


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up for `device` before its first import, silent below warnings, without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops

    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise RuntimeError(f"device is {device}, but DeepSpeed was loaded for {accelerator} in this process")
    # The table of what could be compiled here is asked only for `deepspeed_shm_comm`, an all-reduce for inference that
    # takes g++ a minute. Filling it in, as its first use would, runs compilers too.
    deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_not_about_our_optimizer)
    return deepspeed


def _not_about_our_optimizer(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()
