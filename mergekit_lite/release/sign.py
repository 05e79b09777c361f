"""model.sig: the signature of a release, by OpenSSF model-signing with an elliptic key.

The library hashes every file itself; its signature differs between runs, so it is made last and
lies outside the manifest. Only key mode is used here: it needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError
from mergekit_lite.release.manifest import SIGNATURE

__all__ = ["check_signature", "sign_release"]


def sign_release(folder: Path, key: Path) -> None:
    """Sign a release; an older signature is replaced when the new one is whole.

    Args:
        folder: Of the release.
        key: Private key, PEM, of an elliptic curve.

    Raises:
        PackError: The library is not installed, or the key cannot be used.
    """
    signing, _, hashing = _library()
    beside = folder.parent / f".{folder.name}.sig"
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=str(key))
        config.set_hashing_config(_hashing(hashing, folder)).sign(str(folder), str(beside))
        beside.rename(folder / SIGNATURE)
    except Exception as error:  # whatever the library raises for a key or a folder
        raise PackError(
            f"{folder}: cannot be signed with {key} ({_said(error)})",
            "Give a private key of an elliptic curve: openssl ecparam -name prime256v1 -genkey "
            "-noout -out key.pem",
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def check_signature(folder: Path, key: Path) -> str | None:
    """Check the signature of a release.

    Args:
        folder: Of the release.
        key: Public key, PEM.

    Returns:
        What does not hold; None if all does.

    Raises:
        PackError: The library is not installed.
    """
    if not (folder / SIGNATURE).is_file():
        return f"{SIGNATURE}: is missing; the release is not signed"
    _, verifying, hashing = _library()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=str(key))
        config.set_hashing_config(_hashing(hashing, folder)).verify(
            str(folder), str(folder / SIGNATURE)
        )
    except Exception as error:  # a signature of other files, by another key, or none at all
        return f"{SIGNATURE}: does not hold ({_said(error)})"
    return None


def _hashing(hashing: Any, folder: Path) -> Any:
    return hashing.Config().set_ignored_paths(
        paths=[str(folder / SIGNATURE)], ignore_git_paths=False
    )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise PackError("signing needs model-signing", "pip install 'pack-models[sign]'") from None
    return signing, verifying, hashing
