"""Addresses of results that do not go to a folder of this machine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.errors import PackError

__all__ = ["SCRATCH", "Address"]

SCRATCH = Path("dist") / ".uploads"
"""Where shards lie until they are uploaded, and what is noted of those that are."""
_REMOTE = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://(?P<place>.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """Where a result goes that is not a folder.

    Attributes:
        scheme: ``s3`` or ``hf``.
        place: What follows; without slashes at its ends.
    """

    scheme: str
    place: str

    @staticmethod
    def parse(text: str) -> Address:
        """Read ``s3://BUCKET/PREFIX`` or ``hf://ORG/NAME``.

        Raises:
            PackError: It is neither.
        """
        match = _REMOTE.fullmatch(text)
        scheme, place = (match["scheme"], match["place"].strip("/")) if match else ("", "")
        if scheme == "s3":
            bucket, _, prefix = place.partition("/")
            parts = prefix.split("/")
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]+", bucket) or not all(parts) or ".." in parts:
                raise PackError(f"'{text}' names no place in a bucket", "Write s3://BUCKET/PREFIX.")
        elif scheme == "hf":
            from mergekit_lite.release.hub import check_repo

            check_repo(place)
        else:
            raise PackError(
                f"'{text}': results cannot be written there",
                "Give a folder, s3://BUCKET/PREFIX or hf://ORG/NAME: -o WHERE",
            )
        return Address(scheme, place)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}"

    def below(self, name: str) -> Address:
        """The address of a folder in this one."""
        return Address(self.scheme, f"{self.place}/{name}")

    @property
    def scratch(self) -> Path:
        """The folder here that unfinished shards are kept beside, of this address alone."""
        text = str(self)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[-60:]
        return SCRATCH / f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
