"""S3 for fsspec as we need it: our own retries, nothing remembered of listings, puts on condition.

Only `files` imports this, and only where a path is in S3, as it needs the extra `s3`. Credentials, region and endpoint
come from the environment or the rest of the provider chain (AWS_PROFILE, AWS_ENDPOINT_URL, a machine's role, …).
"""

from __future__ import annotations

import datetime as dt
import email.utils
from collections.abc import Mapping
from typing import Any

import s3fs
from botocore.exceptions import BotoCoreError
from fsspec.asyn import sync_wrapper

from ncf_dist.retries import answered, retried_async

LARGE_BYTES = 2**26


class S3(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs, each of whose requests is tried again by our rules alone: they are counted there."""

    retries = 1
    read_timeout = 60

    def __init__(self, *args: Any, **options: Any) -> None:
        # One client for each process; what it saw of a folder is not what another process has put there since.
        options.setdefault("use_listings_cache", False)
        options.setdefault("config_kwargs", {"retries": {"total_max_attempts": 1}, "max_pool_connections": 32})
        super().__init__(*args, **options)

    async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            return await retried_async(lambda: super(S3, self)._call_s3(method, *args, **options))
        except BotoCoreError as error:  # No credentials, nobody at the endpoint: what a store says is an OSError.
            raise OSError(f"S3 cannot be asked ({error})") from error

    call_s3 = sync_wrapper(_call_s3)

    def put_if(self, inner: str, data: bytes, **condition: str) -> str | None:
        """Put an object where the condition holds (IfNoneMatch, IfMatch); its entity tag, or None where it does not."""
        bucket, key, _ = self.split_path(inner)
        try:
            return str(self.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        except OSError as error:
            answer = answered(error)
            if answer is not None and (answer[0] == 412 or (answer[0] == 404 and _is_gone(condition, answer[1]))):
                return None
            raise

    def get_tagged(self, inner: str) -> tuple[bytes, str, float]:
        """(bytes, entity tag, seconds since it was written by the store's own clock). Raises FileNotFoundError."""
        bucket, key, _ = self.split_path(inner)
        answer = self.call_s3("get_object", Bucket=bucket, Key=key)
        return self._body(answer), str(answer["ETag"]), _age(answer)

    def get_range(self, inner: str, start: int, end: int, tag: str) -> bytes:
        """Bytes of the very object that has this entity tag. Raises OSError where it was replaced meanwhile."""
        bucket, key, _ = self.split_path(inner)
        part = {"Range": f"bytes={start}-{end - 1}", "IfMatch": tag}
        try:
            return bytes(self._body(self.call_s3("get_object", Bucket=bucket, Key=key, **part)))
        except OSError as error:
            if (answered(error) or (0,))[0] == 412:
                said = f"{bucket}/{key} was replaced while it was read; needed a file that stays: run this again"
                raise OSError(said) from None
            raise

    def get_whole(self, inner: str) -> bytes:
        """An object's bytes by one request; a large one by several at once. Raises FileNotFoundError."""
        bucket, key, _ = self.split_path(inner)
        answer = self.call_s3("get_object", Bucket=bucket, Key=key)
        if int(answer["ContentLength"]) <= LARGE_BYTES:
            return bytes(self._body(answer))
        answer["Body"].close()
        return bytes(self.cat_file(inner))

    async def _read_body(self, answer: Mapping[str, Any]) -> bytes:
        body = answer["Body"]
        try:
            return bytes(await body.read())
        finally:
            body.close()

    _body = sync_wrapper(_read_body)


def _is_gone(condition: Mapping[str, str], code: str) -> bool:
    """Whether 404 says that there is no such object to replace. To a put without If-Match it says something else."""
    return "IfMatch" in condition and code != "NoSuchBucket"


def _age(answer: Mapping[str, Any]) -> float:
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = email.utils.parsedate_to_datetime(said) if said else dt.datetime.now(dt.timezone.utc)
    return max(0.0, float((now - answer["LastModified"]).total_seconds()))


def delta_options(fs: S3) -> dict[str, str]:
    """For delta-rs, which opens stores itself: the same endpoint, region and credentials as ours, fresh ones. Never
    stored, never logged."""
    client = fs.s3
    found = {"AWS_REGION": client.meta.region_name or "us-east-1", "AWS_ENDPOINT_URL": client.meta.endpoint_url}
    credentials = _frozen(fs)
    if credentials is not None:
        found |= {"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key}
        if credentials.token:
            found["AWS_SESSION_TOKEN"] = credentials.token
    if found["AWS_ENDPOINT_URL"].startswith("http://"):
        found["AWS_ALLOW_HTTP"] = "true"
    return {**found, "AWS_CONDITIONAL_PUT": "etag"}


async def _resolved(fs: S3) -> Any:
    await fs.set_session()
    credentials = await fs.session.get_credentials()
    return None if credentials is None else await credentials.get_frozen_credentials()


_frozen = sync_wrapper(_resolved)
