"""What a picture says of where it comes from: in its metadata always, and signed (C2PA) where there is a key.

Pictures travel further than the answers that they come in: they name model, revision and seed, and no prompt.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from unclip.config.base import ConfigError
from unclip.generation.outputs import encode_png
from unclip.serving.config import ProvenanceConfig
from unclip.utils import storage

_VERSION = version("unclip")
SOFTWARE = f"unclip/{_VERSION}"
"""What made a picture."""
_SETTINGS = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},  # one in each file would be a second, unguarded copy of the picture
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}
_UNTRUSTED = "signingCredential.untrusted"
"""Whose list of roots a reader believes is its own affair."""
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:unclip="urn:unclip:picture:1.0"
 {fields}/></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class Label:
    """What a picture says of itself.

    Args:
        model: its name in the API.
        revision: digest of the bundle.
        seed: of this picture.
        created: unix seconds.
        is_composite: whether parts of it are those of a picture that somebody gave, as in an edit.
        attribution: what the licences of the training data want said beside it.
    """

    model: str
    revision: str
    seed: int
    created: int
    is_composite: bool = False
    attribution: str = ""

    @property
    def source_type(self) -> str:
        """IPTC's digital source type, as an address."""
        return _SOURCE_TYPES + (
            "compositeWithTrainedAlgorithmicMedia" if self.is_composite else "trainedAlgorithmicMedia"
        )

    @property
    def created_at(self) -> str:
        """ISO 8601, UTC."""
        return datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z")

    def texts(self) -> dict[str, str]:
        """Names and texts for the chunks of a PNG file; the first three names are those of its standard."""
        said = {
            "Software": SOFTWARE,
            "Creation Time": self.created_at,
            "Copyright": self.attribution and f"Training data: {self.attribution}",
            "DigitalSourceType": self.source_type,
            "Model": self.model,
            "Revision": self.revision,
            "Seed": str(self.seed),
        }
        return {name: text for name, text in said.items() if text}

    def xmp(self) -> bytes:
        """The same as an XMP packet, in IPTC's and Adobe's fields where there are some."""
        fields = {
            "xmp:CreatorTool": SOFTWARE,
            "xmp:CreateDate": self.created_at,
            "photoshop:Credit": self.attribution and f"Training data: {self.attribution}",
            "Iptc4xmpExt:DigitalSourceType": self.source_type,
            "unclip:Model": self.model,
            "unclip:Revision": self.revision,
            "unclip:Seed": str(self.seed),
        }
        shown = "\n ".join(f"{name}={quoteattr(text)}" for name, text in fields.items() if text)
        return _XMP.format(fields=shown).encode()


class Signer:
    """Signs pictures as C2PA content credentials; may be used from any thread. Nothing is asked of the network.

    Args:
        certificates: PEM chain, the one that signs first. C2PA wants it to be issued by another, for signing documents or e-mail.
        key: PEM of its private key.
        algorithm: how the key signs.

    Raises `ConfigError` where they do not fit each other or C2PA's rules: a signature is tried at once.
    """

    def __init__(self, certificates: str, key: str, algorithm: str) -> None:
        self._c2pa = _library()
        try:
            info = self._c2pa.C2paSignerInfo(algorithm, certificates.encode(), key.encode(), None)
            self._context = self._c2pa.Context.from_dict(_SETTINGS, signer=self._c2pa.Signer.from_info(info))
            self._try()
        except self._c2pa.C2paError as error:
            raise ConfigError(
                f"provenance: the C2PA certificates and key cannot sign by {algorithm}: {error}"
            ) from None

    @classmethod
    def from_config(cls, config: ProvenanceConfig) -> Signer | None:
        """None where no certificates are configured; raises `ConfigError` where they cannot be read or used."""
        if config.c2pa_certificates is None or config.c2pa_key is None:
            return None
        certificates = _read_pem("c2pa_certificates", config.c2pa_certificates)
        return cls(certificates, _read_pem("c2pa_key", config.c2pa_key), config.c2pa_algorithm)

    def sign(self, content: bytes, media_type: str, label: Label) -> bytes:
        """The file with a signed manifest in it."""
        signed = io.BytesIO()
        with self._c2pa.Builder(_manifest(label), context=self._context) as builder:
            builder.sign(media_type, io.BytesIO(content), signed)
        return signed.getvalue()

    def _try(self) -> None:
        """Signs a small picture and reads it back: a key of another certificate signs, too, but nobody accepts it."""
        signed = self.sign(
            encode_png(np.zeros((1, 1, 3), np.uint8), {}), "image/png", Label("unclip", "", 0, int(time.time()))
        )
        with self._c2pa.Reader(
            "image/png", io.BytesIO(signed), context=self._c2pa.Context.from_dict(_SETTINGS)
        ) as reader:
            failures = reader.get_validation_results()["activeManifest"]["failure"]
        wrong = [failure["explanation"] for failure in failures if failure["code"] != _UNTRUSTED]
        if wrong:
            raise ConfigError(f"provenance: the C2PA certificates and key do not sign: {'; '.join(wrong)}")


def _manifest(label: Label) -> dict[str, Any]:
    """What is signed beside the pixels."""
    created = {
        "action": "c2pa.created",
        "when": label.created_at,
        "digitalSourceType": label.source_type,
        "softwareAgent": {"name": "unclip", "version": _VERSION},
        "parameters": {"model": label.model, "revision": label.revision, "seed": label.seed},
    }
    return {
        "claim_generator_info": [{"name": "unclip", "version": _VERSION}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _library() -> Any:
    try:
        import c2pa  # optional, and a second to load
    except ImportError as error:
        raise ConfigError(f"provenance.c2pa_certificates: signing needs the `c2pa` extra: {error}") from None
    return c2pa


def _read_pem(field: str, uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"provenance.{field} = {uri!r}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
