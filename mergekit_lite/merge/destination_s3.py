"""Results in a bucket of S3, or of what speaks its protocol.

Every shard is a multipart upload that is completed only at the end: until then nobody sees it. S3
changes one object at a time, so the end is not one step: the former lock is removed first, then the
shards are completed, the small files written, and the new lock last. A prefix without a lock is no
result. The digest of a shard is in its metadata, which tells a continued run what is done.

The library is s3fs, whose client finds credentials, region and endpoint where AWS's own tools do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mergekit_lite.checkpoint.far.fetcher import at_once
from mergekit_lite.errors import PackError
from mergekit_lite.merge.destination import LOCK, Missing, Piece

__all__ = ["S3Store"]

PART = 8 << 20
"""Bytes of a part, at least; S3 takes 5 MiB or more, and 10,000 parts of an object."""
_PARTS = 9000
_AT_ONCE = 4
_DIGEST = "pack-sha256"
_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
     "TokenRetrievalError", "SSOError", "NoAuthTokenError"}
)  # fmt: skip
_REFUSED = frozenset(
    {"AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
     "SignatureDoesNotMatch", "RequestTimeTooSkewed", "AccountProblem", "403", "Forbidden"}
)  # fmt: skip


class S3Store:
    """A prefix of a bucket.

    Args:
        place: ``BUCKET/PREFIX``.

    Raises:
        PackError: s3fs is not installed.
    """

    def __init__(self, place: str) -> None:
        if importlib.util.find_spec("s3fs") is None:
            raise PackError(
                f"s3://{place}: writing to S3 needs s3fs", "pip install 'pack-models[s3]'"
            )
        self._bucket, _, self._prefix = place.partition("/")
        self._fs: Any = None

    def _call(self, method: str, **words: Any) -> dict[str, Any]:
        """One request, tried again by the library where that makes sense."""
        if self._fs is None:
            import s3fs

            # A bucket of a listing that is minutes old would be no ground for a refusal.
            self._fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=self._bucket, **words)
        return answer

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def names(self) -> frozenset[str]:
        """Every object below the prefix."""
        words: dict[str, Any] = {"Prefix": f"{self._prefix}/"}
        found: list[str] = []
        while True:
            page = self._call("list_objects_v2", **words)
            found += [entry["Key"][len(self._prefix) + 1 :] for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                # A console makes an empty object of the prefix's own name for a new folder.
                return frozenset(name for name in found if name)
            words["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, name: str) -> bytes:
        """An object's content."""
        content: bytes = self._fs.cat_file(f"{self._bucket}/{self._key(name)}")
        return content

    def prepare(self) -> None:
        """Nothing: a prefix is there as soon as an object is."""

    def upload(self, piece: Piece, save: Callable[[], None], stopped: threading.Event) -> None:
        """Send the parts that are not there yet, several at a time."""
        state, key = piece.state, self._key(piece.name)
        parts: dict[int, str] = {}
        if "id" in state:
            try:
                parts = self._parts(key, state["id"], piece.size, state["part"])
            except FileNotFoundError:
                del state["id"]
        if "id" not in state:
            if state.pop("again", False):
                self._forget(key)
            began = self._call("create_multipart_upload", Key=key,
                               Metadata={_DIGEST: piece.sha256})  # fmt: skip
            state["part"] = max(PART, -(-piece.size // _PARTS))
            state["id"] = began["UploadId"]
            save()
        size: int = state["part"]
        todo = [n for n in range(1, _count(piece.size, size) + 1) if n not in parts]

        failed: list[Exception] = []

        def send(number: int) -> None:
            if failed:
                return
            try:
                if stopped.is_set():
                    raise PackError("stopped")
                with piece.path.open("rb") as file:
                    file.seek((number - 1) * size)
                    body = file.read(size)
                sent = self._call("upload_part", Key=key, UploadId=state["id"], PartNumber=number,
                                  Body=body)  # fmt: skip
                parts[number] = sent["ETag"]
            except Exception as error:  # the others end first: a part is not sent twice at a time
                failed.append(error)

        # Not a pool of `concurrent.futures`: the interpreter would wait for its threads at exit.
        at_once(send, todo, _AT_ONCE)
        if failed:
            raise failed[0]
        state["parts"] = [parts[number] for number in sorted(parts)]
        state["done"] = "up"

    def _parts(self, key: str, upload: str, size: int, part: int) -> dict[int, str]:
        """ETags by number of the parts that have come whole."""
        words: dict[str, Any] = {"Key": key, "UploadId": upload}
        found: dict[int, str] = {}
        while True:
            page = self._call("list_parts", **words)
            for entry in page.get("Parts", ()):
                number = entry["PartNumber"]
                if entry["Size"] == min(part, size - (number - 1) * part):
                    found[number] = entry["ETag"]
            if not page.get("IsTruncated"):
                return found
            words["PartNumberMarker"] = page["NextPartNumberMarker"]

    def _forget(self, key: str) -> None:
        """Abort uploads of a key whose identifiers were lost with the run that began them."""
        page = self._call("list_multipart_uploads", Prefix=key)
        for entry in page.get("Uploads", ()):
            if entry["Key"] == key:
                self._abort(key, entry["UploadId"])

    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it is gone
            self._call("abort_multipart_upload", Key=key, UploadId=upload)

    def is_there(self, piece: Piece) -> bool:
        """Whether the parts are waiting, or have become an object already."""
        key = self._key(piece.name)
        try:
            self._call("list_parts", Key=key, UploadId=piece.state["id"], MaxParts=1)
        except FileNotFoundError:
            return self._is_object(piece)
        return True

    def _is_object(self, piece: Piece) -> bool:
        try:
            head = self._call("head_object", Key=self._key(piece.name))
        except FileNotFoundError:
            return False
        return bool(
            head["ContentLength"] == piece.size and head["Metadata"].get(_DIGEST) == piece.sha256
        )

    def discard(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Abort uploads, which would cost their owner storage that no listing shows."""
        for name, state in states.items():
            if "id" in state:
                self._abort(self._key(name), state["id"])
            else:
                self._forget(self._key(name))

    def commit(
        self, pieces: Collection[Piece], files: Mapping[str, bytes], leftover: Collection[str]
    ) -> None:
        """Remove the former lock, complete the shards, write the small files, the lock last."""
        if LOCK in self.names():
            self._remove([LOCK])
        for piece in pieces:
            self._complete(piece)
        for name in sorted(files, key=lambda name: (name == LOCK, name)):
            self._call("put_object", Key=self._key(name), Body=files[name])
        self._remove(leftover)

    def _complete(self, piece: Piece) -> None:
        etags = enumerate(piece.state["parts"], 1)
        try:
            self._call(
                "complete_multipart_upload", Key=self._key(piece.name),
                UploadId=piece.state["id"],
                MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in etags]},
            )  # fmt: skip
        except FileNotFoundError:  # completed by a run that was killed, or aborted by a rule
            if not self._is_object(piece):
                raise Missing(piece.name) from None

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            self._call("delete_object", Key=self._key(name))

    def began_to_commit(self, names: Collection[str], lock_sha256: str) -> bool:
        """Yes: the objects of a commit come one by one."""
        return True

    def explained(self, error: Exception) -> PackError:
        """By the code of the answer; its text may hold the name of a key."""
        where = f"s3://{self._bucket}/{self._prefix}"
        kinds = set(_kinds(error))
        code = _code(error)
        if kinds & _CREDENTIALS:
            return PackError(
                f"{where}: no credentials for S3",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write "
                "~/.aws/credentials (aws configure); on AWS the machine's role is used.",
            )
        if code == "NoSuchBucket":
            return PackError(
                f"{where}: there is no bucket '{self._bucket}'", "Create it, or check its name."
            )
        if code in _REFUSED or isinstance(error, PermissionError):
            return PackError(
                f"{where}: S3 refuses you ({code or type(error).__name__})",
                "Check the credentials; writing needs s3:ListBucket, ListBucketMultipartUploads, "
                "GetObject, PutObject, DeleteObject, AbortMultipartUpload and "
                "ListMultipartUploadParts.",
            )
        if code:
            return PackError(f"{where}: S3 answers {code}", "Check the bucket and its region.")
        return PackError(
            f"{where}: S3 cannot be reached ({type(error).__name__})",
            "Check the network, AWS_REGION, and AWS_ENDPOINT_URL_S3 if it is not Amazon's.",
        )

    def is_final(self, error: Exception) -> bool:
        """Credentials, permissions, and a bucket that is not there stay as they are."""
        return bool(
            set(_kinds(error)) & _CREDENTIALS
            or isinstance(error, PermissionError)
            or _code(error) in _REFUSED | {"NoSuchBucket"}
        )


def _count(size: int, part: int) -> int:
    """Number of parts of an object."""
    return max(1, math.ceil(size / part))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _kinds(error: Exception) -> Iterator[str]:
    """Names of the classes of an error and of its causes."""
    return (kind.__name__ for link in _chain(error) for kind in type(link).__mro__)


def _code(error: Exception) -> str:
    """The code of S3's answer; empty if there was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""
