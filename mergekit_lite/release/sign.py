"""model.sig: the signature of a release, by OpenSSF model-signing.

The library hashes every file itself; its signature differs between runs, so it is made last and
lies outside the manifest. A key of an elliptic curve needs no network; without a key, Sigstore
binds the signature to whoever is logged in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError
from mergekit_lite.release.manifest import SIGNATURE
from mergekit_lite.release.place import Place

__all__ = ["KEYLESS", "Signer", "check_signature", "key_file", "sign_release"]

KEYLESS = "sigstore"
"""In the place of a key: sign without one."""


@dataclass(frozen=True)
class Signer:
    """Whose signature is expected.

    Attributes:
        key: Public key, PEM; None for a signature of Sigstore.
        identity: Who signed by Sigstore, for example an address.
        issuer: Who vouched for that, for example ``https://accounts.google.com``.
    """

    key: Path | None = None
    identity: str = ""
    issuer: str = ""


def key_file(word: str) -> Path | None:
    """The file of a private key; None for `KEYLESS`.

    Raises:
        PackError: There is no such file.
    """
    if word == KEYLESS:
        return None
    if not Path(word).is_file():
        raise PackError(f"{word}: there is no such key", "Give a private key's file, or sigstore.")
    return Path(word)


def sign_release(folder: Path, key: Path | None) -> bool:
    """Sign a release.

    Args:
        folder: Of the release.
        key: Private key, PEM, of an elliptic curve; None to sign by Sigstore, which asks who you
            are in the browser or takes what a CI system says.

    Returns:
        Whether it was signed now; it may have been by the same key before.

    Raises:
        PackError: The library is not installed, the key cannot be used, or the release is signed
            by another one.
    """
    signing, _, hashing = _library()
    if (folder / SIGNATURE).is_file():
        if key is not None and _is_by(folder, key):
            return False
        raise PackError(
            f"{folder}: is signed already, by another key",
            f"A release has one signature; remove {folder / SIGNATURE} to replace it.",
        )
    beside = folder.parent / f".{folder.name}.sig"
    try:
        config = signing.Config()
        if key is None:
            config = config.use_sigstore_signer(use_ambient_credentials=True)
        else:
            config = config.use_elliptic_key_signer(private_key=str(key))
        config.set_hashing_config(_hashing(hashing)).sign(str(folder), str(beside))
        beside.rename(folder / SIGNATURE)
    except Exception as error:  # whatever the library raises for a key, a folder or a network
        raise PackError(
            f"{folder}: cannot be signed with {key or KEYLESS} ({_said(error)})",
            "Signing without a key needs the network; give a key instead: --sign KEY"
            if key is None else
            "Give a private key of an elliptic curve: openssl ecparam -name prime256v1 -genkey "
            "-noout -out key.pem",
        ) from None  # fmt: skip
    finally:
        beside.unlink(missing_ok=True)
    return True


def _is_by(folder: Path, key: Path) -> bool:
    """Whether a release is signed by a private key."""
    from cryptography.hazmat.primitives import serialization

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError):  # no key, or one with a password
        return False
    with tempfile.NamedTemporaryFile() as public:
        public.write(private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ))  # fmt: skip
        public.flush()
        return check_signature(Place(folder), Signer(Path(public.name))) is None


def check_signature(place: Place, signer: Signer) -> str | None:
    """Check the signature of a release.

    Args:
        place: The release.
        signer: Whose it must be.

    Returns:
        What does not hold; None if all does.

    Raises:
        PackError: The library is not installed.
    """
    folder = place.folder
    if not (folder / SIGNATURE).is_file():
        return f"{SIGNATURE}: is missing; the release is not signed"
    _, verifying, hashing = _library()
    try:
        if signer.key is None:
            config = verifying.Config().use_sigstore_verifier(
                identity=signer.identity, oidc_issuer=signer.issuer
            )
        else:
            config = verifying.Config().use_elliptic_key_verifier(public_key=str(signer.key))
        hashed = _hashing(hashing, place.ignored, place.links_into is not None)
        config.set_hashing_config(hashed).verify(str(folder), str(folder / SIGNATURE))
    except Exception as error:  # a signature of other files, by another key, or none at all
        return f"{SIGNATURE}: does not hold ({_said(error)})"
    return None


def _hashing(hashing: Any, also: Iterable[str] = (), links: bool = False) -> Any:
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE, *also], ignore_git_paths=False)
    return config.set_allow_symlinks(links)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise PackError("signing needs model-signing", "pip install 'pack-models[sign]'") from None
    return signing, verifying, hashing
