"""Connections to object storage: which server, region and credentials, by the environment; what its errors mean."""

from __future__ import annotations

import configparser
import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyarrow import fs

SCHEMES = ("s3", "gs")
RETRY_SECONDS = 300.0  # an outage of the store shorter than this costs no finished file


class RunError(RuntimeError):
    """A run failed or its folder can't be used; the message says what is kept and what to do."""


def is_url(path: object) -> bool:
    """Whether a path names a place in object storage."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def open_filesystem(place: str) -> fs.FileSystem:
    """pyarrow's filesystem of a URL's bucket."""
    return _filesystem(*_bucket_of(place), _environment())


def connect(place: str, *, patient: bool = True) -> Any:
    """obstore's client of a URL's bucket. `patient`: it rides out an outage; else it fails within seconds."""
    return _object_store(*_bucket_of(place), _environment(), patient)


def _bucket_of(place: str) -> tuple[str, str]:
    scheme, _, rest = place.partition("://")
    return scheme, rest.partition("/")[0]


def _environment() -> tuple[tuple[str, str], ...]:
    """What decides how stores are reached: a part of the caches' keys."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_"))))


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region(bucket: str) -> str:
    given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if given or _endpoint():
        return given or "us-east-1"
    with named_errors(f"s3://{bucket}"):
        return fs.resolve_s3_region(bucket)


@functools.lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str, environment: object) -> fs.FileSystem:
    if scheme == "gs":
        return fs.GcsFileSystem()
    options = {"endpoint_override": endpoint} if (endpoint := _endpoint()) else {}
    return fs.S3FileSystem(region=_region(bucket), connect_timeout=10, request_timeout=60, **options)


@functools.lru_cache(maxsize=32)
def _object_store(scheme: str, bucket: str, environment: object, patient: bool) -> Any:
    from obstore.store import GCSStore, S3Store

    endpoint = _endpoint() if scheme == "s3" else None
    common: dict[str, Any] = {
        "client_options": {
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "connect_timeout": "10s",
            "timeout": "120s",
        },
        "retry_config": {
            "max_retries": 100_000 if patient else 3,  # the time decides
            "retry_timeout": timedelta(seconds=RETRY_SECONDS if patient else 20.0),
        },
    }
    if scheme == "gs":
        return GCSStore(bucket, **common)
    options: dict[str, Any] = {"region": _region(bucket), **({"endpoint": endpoint} if endpoint else {})}
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if "AWS_ACCESS_KEY_ID" not in os.environ and file.is_file():  # pyarrow reads it, obstore does not
        profiles = configparser.ConfigParser()
        profiles.read(file)
        profile = os.environ.get("AWS_PROFILE", "default")
        if profiles.has_option(profile, "aws_access_key_id"):
            keys = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
            options |= {key: profiles[profile][key] for key in keys if key in profiles[profile]}
    return S3Store(bucket, **options, **common)


@contextlib.contextmanager
def named_errors(place: str) -> Iterator[None]:
    """Errors of a store as one line that names the place and what to look at; those of a disk as they are."""
    if not is_url(place):
        yield
        return
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (FileNotFoundError, AlreadyExistsError, PreconditionError):
        raise
    except (OSError, BaseError) as error:
        reason = " ".join(str(error).partition("Debug source")[0].split())[:300]
        raise RunError(
            f"{place}: {reason}; check the bucket, AWS_* or Google "
            "credentials, and AWS_ENDPOINT_URL for a server of your own"
        ) from None
