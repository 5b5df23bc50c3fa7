"""What drawn embeddings and pictures are worth, measured against held-out records."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from unclip.data.decode import decode_image
from unclip.data.manifest import read_slices, scan
from unclip.evaluation.caption_scores import clip_scores
from unclip.evaluation.extractors import CLIP, CLIP_TEXT, ClipExtractor, central_square, extract_all
from unclip.evaluation.frechet import frechet_distance, statistics_of
from unclip.evaluation.manifolds import diversity
from unclip.models.clip import load_clip

_MICROBATCH = 64
_MOSAIC = 4


class Judge:
    """Compares what is drawn for held-out captions with the held-out pictures.

    Pictures are judged by a CLIP that neither prior nor decoder was trained with: their own would favour what pleases it.

    Attributes:
        captions: N, each `pictures` times in a row.

    Args:
        records: folder with `image`, `caption` and `image_embed`.
        source: the judging CLIP.
        captions: how many of the records' first captions are drawn, at most.
        pictures: of each caption.
        side: of the drawn pictures in pixels.
    """

    def __init__(
        self, records: str, source: str, *, captions: int, pictures: int, side: int, device: torch.device
    ) -> None:
        columns = ("image", "caption", "image_embed")
        manifest = scan(records, columns)
        slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
        table = read_slices(manifest, slices, columns)
        real = [decode_image(image.as_py()) for image in table.column("image")]
        count = min(captions, len(real))
        self.captions = [text for text in table.column("caption").to_pylist()[:count] for _ in range(pictures)]
        self._pictures = pictures
        self._extractor = ClipExtractor(source, load_clip(source))
        self._extractor.setup(str(device))
        self._real = np.stack([central_square(picture, side) for picture in real])
        self._real_features = self._features(self._real, [""] * len(real))[CLIP]
        embeds = np.array(table.column("image_embed").to_pylist(), dtype=np.float32)
        self._real_embeds = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
        self._own_embeds = self._real_embeds[:count].repeat(pictures, axis=0)

    def embeddings(self, drawn: torch.Tensor) -> dict[str, float]:
        """`cosine` of (N, D) to the z_i of each caption's own picture, `frechet` distance to those of all held-out
        pictures, `diversity` of a caption's."""
        found = drawn.numpy()
        return {
            "cosine": float(clip_scores(found, self._own_embeds).mean()),
            "frechet": frechet_distance(statistics_of(found), statistics_of(self._real_embeds)),
            "diversity": self._diversity(found),
        }

    def pictures(self, drawn: npt.NDArray[np.uint8]) -> dict[str, float]:
        """`clip_score` of uint8 (N, S, S, 3), `frechet` distance to all held-out pictures (FD-CLIP), `diversity` of a
        caption's: the mean cosine distance of two."""
        features = self._features(drawn, self.captions)
        return {
            "clip_score": float(clip_scores(features[CLIP], features[CLIP_TEXT]).mean()),
            "frechet": frechet_distance(statistics_of(features[CLIP]), statistics_of(self._real_features)),
            "diversity": self._diversity(features[CLIP]),
        }

    def mosaic(self, drawn: npt.NDArray[np.uint8] | None) -> bytes:
        """PNG with the first picture of each of the first captions, or, for None, the real ones."""
        chosen = self._real if drawn is None else drawn[:: self._pictures]
        side = chosen.shape[1]
        page = Image.new("RGB", (_MOSAIC * side, _MOSAIC * side), "white")
        for index, picture in enumerate(chosen[: _MOSAIC**2]):
            page.paste(Image.fromarray(picture), (index % _MOSAIC * side, index // _MOSAIC * side))
        buffer = io.BytesIO()
        page.save(buffer, "PNG")
        return buffer.getvalue()

    def _diversity(self, features: npt.NDArray[np.float32]) -> float:
        return float(np.mean([diversity(of_one) for of_one in features.reshape(-1, self._pictures, features.shape[1])]))

    def _features(self, pictures: npt.NDArray[np.uint8], captions: list[str]) -> dict[str, npt.NDArray[np.float32]]:
        inputs = self._extractor.prepare(list(pictures), captions)
        return extract_all([self._extractor], inputs, _MICROBATCH)
