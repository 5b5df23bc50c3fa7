"""C2PA manifests, signed by certificates that are made here and read back by the C2PA library."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from unclip.config.base import ConfigError
from unclip.serving.config import ProvenanceConfig
from unclip.serving.pictures.encoding import MEDIA_TYPES, Encoder, Form
from unclip.serving.pictures.provenance import Label, Signer

LABEL = Label(model="hearts", revision="ab" * 32, seed=7, created=1_790_000_000)
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def certificate(
    key: Any,
    issuer_key: Any,
    *,
    is_root: bool = False,
    days: int = 30,
    usage: Any = ExtendedKeyUsageOID.EMAIL_PROTECTION,
) -> str:
    """PEM of a certificate for `key`, signed by `issuer_key`; of a root where that is asked for."""
    now = datetime.now(UTC)
    names = [
        x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        for name in ("Root" if is_root else "Signer", "Root")
    ]
    keys = key.public_key(), issuer_key.public_key()
    builder = (
        x509.CertificateBuilder(*reversed(names), keys[0], x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[0]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[1]), critical=False)
    )
    if not is_root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = builder.sign(issuer_key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def private_pem(key: Any) -> str:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*form).decode()


@dataclass(frozen=True)
class Authority:
    """A root, and one certificate that it has signed."""

    root: str
    chain: str
    key: str

    def read(self, content: bytes, form: Form) -> c2pa.Reader:
        trust = {"trust": {"trust_anchors": self.root}, "verify": {"verify_trust": True, "ocsp_fetch": False}}
        return c2pa.Reader(MEDIA_TYPES[form], io.BytesIO(content), context=c2pa.Context.from_dict(trust))


def authority(algorithm: str = "es256", **changes: Any) -> Authority:
    root_key, key = KEYS["es256"](), KEYS[algorithm]()
    root = certificate(root_key, root_key, is_root=True)
    return Authority(root, certificate(key, root_key, **changes) + root, private_pem(key))


@pytest.fixture(scope="module")
def ours() -> Authority:
    return authority()


@pytest.fixture(scope="module")
def signer(ours: Authority) -> Signer:
    return Signer(ours.chain, ours.key, "es256")


def encode(signer: Signer, form: Form, label: Label = LABEL) -> bytes:
    return Encoder(signer).encode(PICTURE, form=form, compression=90, label=label)


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_signed_pictures_are_trusted_by_who_trusts_the_root(ours: Authority, signer: Signer, form: Form) -> None:
    with ours.read(encode(signer, form), form) as reader:
        assert reader.get_validation_state() == "Trusted"
        manifest = reader.get_active_manifest()
    assert manifest is not None
    assert manifest["claim_generator_info"][0]["name"] == "unclip"
    (action,) = manifest["assertions"][0]["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert action["parameters"] == {"model": "hearts", "revision": "ab" * 32, "seed": 7}


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_a_changed_byte_is_seen(ours: Authority, signer: Signer, form: Form) -> None:
    content = bytearray(encode(signer, form))
    marker = {"png": b"IEND", "jpeg": b"\xff\xd9", "webp": b"VP8 "}[form]
    near = bytes(content).rindex(marker)  # behind the last pixels of a PNG and a JPEG, before the first of a WebP
    content[near + 500 if form == "webp" else near - 100] ^= 1
    with ours.read(bytes(content), form) as reader:
        assert reader.get_validation_state() == "Invalid"
        assert "assertion.dataHash.mismatch" in json.dumps(reader.get_validation_results())


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_pixels_and_metadata_are_those_of_the_unsigned_file(signer: Signer, form: Form) -> None:
    plain = Encoder(None).encode(PICTURE, form=form, compression=90, label=LABEL)
    before, after = (Image.open(io.BytesIO(content)) for content in (plain, encode(signer, form)))
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    assert b"trainedAlgorithmicMedia" in after.info["xmp"]


def test_edits_are_signed_as_composites(ours: Authority, signer: Signer) -> None:
    edit = Label(model="hearts", revision="r", seed=0, created=0, is_composite=True)
    with ours.read(encode(signer, "png", edit), "png") as reader:
        assert reader.get_validation_state() == "Trusted"
        assert "compositeWithTrainedAlgorithmicMedia" in reader.json()


def test_many_threads_may_sign(ours: Authority, signer: Signer) -> None:
    labels = [Label(model="hearts", revision="r", seed=seed, created=0) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda label: encode(signer, "jpeg", label), labels))
    for label, content in zip(labels, contents, strict=True):
        with ours.read(content, "jpeg") as reader:
            assert reader.get_validation_state() == "Trusted"
            assert f'"seed": {label.seed}' in reader.json()


@pytest.mark.parametrize("algorithm", KEYS)
def test_every_algorithm_signs(tmp_path: Path, algorithm: str) -> None:
    made = authority(algorithm)
    for name, text in (("chain.pem", made.chain), ("key.pem", made.key)):
        (tmp_path / name).write_text(text)
    config = ProvenanceConfig.from_dict(
        {
            "c2pa_certificates": str(tmp_path / "chain.pem"),
            "c2pa_key": str(tmp_path / "key.pem"),
            "c2pa_algorithm": algorithm,
        }
    )
    signer = Signer.from_config(config)
    assert signer is not None
    with made.read(encode(signer, "png"), "png") as reader:
        assert reader.get_validation_state() == "Trusted"


def test_without_certificates_nothing_is_signed() -> None:
    assert Signer.from_config(ProvenanceConfig()) is None


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.pem")
    with pytest.raises(ConfigError, match=r"^provenance\.c2pa_certificates = .*gone.pem'"):
        Signer.from_config(ProvenanceConfig(c2pa_certificates=gone, c2pa_key=gone))


def test_a_key_of_another_certificate_is_refused(ours: Authority) -> None:
    with pytest.raises(ConfigError, match="do not sign: claim signature is not valid"):
        Signer(ours.chain, authority().key, "es256")


def test_a_key_of_another_algorithm_is_refused(ours: Authority) -> None:
    with pytest.raises(ConfigError, match=r"^provenance"):
        Signer(ours.chain, ours.key, "ps256")


@pytest.mark.parametrize("text", ["", "no certificate"])
def test_what_is_no_certificate_is_refused(ours: Authority, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^provenance"):
        Signer(text, ours.key, "es256")
    with pytest.raises(ConfigError, match=r"^provenance"):
        Signer(ours.chain, text, "es256")


def test_certificates_that_nobody_accepts_are_refused_at_once() -> None:
    key = KEYS["es256"]()
    with pytest.raises(ConfigError, match="self-signed"):
        Signer(certificate(key, key, is_root=True), private_pem(key), "es256")
    for changes in ({"days": -1}, {"usage": ExtendedKeyUsageOID.SERVER_AUTH}):
        made = authority(**changes)
        with pytest.raises(ConfigError, match=r"^provenance"):
            Signer(made.chain, made.key, "es256")
