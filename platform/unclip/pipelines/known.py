"""Known pixels of pictures at every size of a cascade, and how they meet the pixels that are drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from unclip.diffusion.guidance import Denoise, Guide
from unclip.diffusion.known import known_pixels
from unclip.diffusion.process import DiffusionProcess
from unclip.pipelines.pictures import at_size, to_signed


@dataclass(frozen=True)
class KnownPixels:
    """What B pictures of one size shall show.

    pixels: uint8 (B, S, S, 3); where `mask` is False they mean nothing. mask: (B, S, S) bool, True = known. feather:
    pixels on either side of a pixel whose mean softens the seam, 0 for a hard one.
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    feather: int = 0

    def __post_init__(self) -> None:
        types = self.pixels.dtype, self.mask.dtype
        if types != (torch.uint8, torch.bool) or self.mask.ndim != 3 or self.pixels.shape != (*self.mask.shape, 3):
            raise ValueError(
                f"known pixels must be uint8 (B, S, S, 3) with a mask bool (B, S, S), not {self.pixels.dtype} "
                f"{tuple(self.pixels.shape)} with {self.mask.dtype} {tuple(self.mask.shape)}"
            )

    def select(self, rows: slice, device: torch.device) -> KnownPixels:
        """Those of the pictures `rows`."""
        return KnownPixels(self.pixels[rows].to(device), self.mask[rows].to(device), self.feather)

    @property
    def told(self) -> dict[str, torch.Tensor]:
        """Inputs of a decoder that was trained to inpaint: known (B, 3, S, S) in [-1, 1], known_mask (B, 1, S, S) float."""
        return {"known": to_signed(self.pixels), "known_mask": self.mask[:, None].float()}

    def guide(self, process: DiffusionProcess) -> Guide:
        """Holds the known pixels at every step."""
        known, mask = to_signed(self.pixels), self.mask[:, None]

        def constrained(denoise: Denoise[object]) -> Denoise[object]:
            return known_pixels(denoise, known, mask, process)

        return constrained

    def compose(self, drawn: torch.Tensor) -> torch.Tensor:
        """`drawn` uint8 (B, S, S, 3) with the known pixels bit by bit, and the drawn ones led up to them.

        Around the seam, known pixels in a drawn pixel's neighbourhood take their share of its colour. What lay under the
        drawn part takes none, so nothing of what was erased comes back.
        """
        mask = self.mask[..., None]
        if self.feather:
            share = _box_mean(mask.float(), self.feather)
            colour = _box_mean(mask * self.pixels.float(), self.feather)
            drawn = (drawn * (1 - share) + colour).round().clamp(0, 255).to(torch.uint8)
        return torch.where(mask, self.pixels, drawn)


def known_at(
    pictures: torch.Tensor, keep: torch.Tensor, sizes: Iterable[int], *, feather: float
) -> dict[int, KnownPixels]:
    """The known pixels at each of `sizes`: means over blocks of the large picture, known where the whole block is.

    Args:
        pictures: uint8 (B, S, S, 3), S a multiple of every size.
        keep: (B, S, S) bool, True = known.
        feather: reach of the soft seam as a share of the picture's side; 0 for a hard one.

    Raises `ValueError` where `pictures` or `keep` are something else.
    """
    large = KnownPixels(pictures, keep)
    found = {}
    for size in sizes:
        mask = functional.avg_pool2d(large.mask[:, None].double(), keep.shape[1] // size)[:, 0] == 1
        found[size] = KnownPixels(at_size(large.pixels, size), mask, round(feather * size))
    return found


def _box_mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    """(B, H, W, C): the mean of the square of `reach` pixels around each; beyond the border there is nothing to count."""
    planes = values.permute(0, 3, 1, 2)
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        planes = functional.avg_pool2d(planes, kernel, stride=1, padding=padding, count_include_pad=False)
    return planes.permute(0, 2, 3, 1)
