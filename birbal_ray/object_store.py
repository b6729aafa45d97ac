"""pyarrow's file systems for s3:// and gs:// URLs, with errors that name the place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pyarrow import fs

from birbal_ray.run import RunError


def filesystem_of(url: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for a URL, and the path in it. Credentials are the environment's.

    S3-compatible servers are named by AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3), as for the AWS tools.
    """
    scheme, _, path = url.rstrip("/").partition("://")
    if scheme == "gs":
        return fs.GcsFileSystem(), path
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        with named_errors(url):
            region = fs.resolve_s3_region(path.partition("/")[0])
    options: dict[str, Any] = {"allow_delayed_open": True}  # small files in one request, not three
    if endpoint:
        options["endpoint_override"] = endpoint
    return fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **options), path


@contextlib.contextmanager
def named_errors(place: str) -> Iterator[None]:
    """Storage errors as one line that names the place and what to look at."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(
            f"{place}: {' '.join(str(error).split())[:300]}; check the bucket, AWS_* or Google credentials, and "
            "AWS_ENDPOINT_URL for a server of your own"
        ) from None
