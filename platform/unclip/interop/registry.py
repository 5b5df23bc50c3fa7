"""The kinds of sources that there are importers for, by the name that `jobs/convert.py` takes."""

from __future__ import annotations

from collections.abc import Mapping

from unclip.interop.adm import import_adm
from unclip.interop.base import Importer
from unclip.interop.diffusers.importing import import_folder
from unclip.interop.glide import import_glide
from unclip.interop.hf_clip_folder import import_hf_clip
from unclip.interop.karlo import import_karlo

IMPORTERS: Mapping[str, Importer] = {
    "diffusers": import_folder,
    "hf_clip": import_hf_clip,
    "karlo": import_karlo,
    "glide": import_glide,
    "adm": import_adm,
}
