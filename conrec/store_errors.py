"""What the clients of stores raise, told in words: no credentials, no right, no such bucket, out of reach, no driver.

    storage.exists("s3://bucket/run")    # StorageError: s3://bucket/run: the store is out of reach: ...; check ...

Each client has exceptions of its own, many of them no `OSError`. They are known by the names of their classes and
packages, so that no client is imported here; a serving host may have none of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from conrec.errors import ConrecError, StorageError

CLIENTS = (
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google.api_core", "google.auth"),
    *("paramiko", "requests", "s3fs", "urllib3"),
)
"""Packages that talk to stores."""
_NO_CREDENTIALS = {
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoAuthTokenError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_OUT_OF_REACH = {
    "ClientConnectionError",
    "ConnectTimeoutError",
    "ConnectionError",
    "EndpointConnectionError",
    "HTTPClientError",
    "Timeout",
    "gaierror",
    "herror",
}
"""Classes, or their bases, beside the ConnectionError and TimeoutError of Python."""
_NO_DRIVER = ("libhdfs", "libjvm", "CLASSPATH", "HADOOP_HOME")
"""What Arrow names when it finds no Hadoop client."""
_ORDINARY = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Answers of a store that works."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def names_store(operation: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorates a function of a parameter `url`: what a store's client raises becomes `StorageError` naming it."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def named(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return operation(*args, **kwargs)
        except ConrecError:
            raise
        except Exception as error:
            url = str(signature.bind(*args, **kwargs).arguments["url"])
            told = explain(error, remote="://" in url and not url.startswith(("file://", "local://")))
            if told is None:
                raise
            raise StorageError(f"{url}: {told}") from error

    return named


def explain(error: BaseException, remote: bool = False) -> str | None:
    """What a store's client means by `error`, and the remedy; None where no store is known to be at fault.

    `remote`: `error` was raised by an operation on a store that is no local disk.
    """
    chain = list(_chain(error))
    of_client = any(_is_client(link) for link in chain)
    if not (of_client or remote):
        return None
    if any(name in str(link) for name in _NO_DRIVER for link in chain):
        return (
            f"the driver is missing: {_line(error)}; install a Hadoop client and set HADOOP_HOME, JAVA_HOME, CLASSPATH"
        )
    if any(_is(link, _NO_CREDENTIALS) for link in chain):
        return (
            f"no credentials: {_line(error)}; set those of this store (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS), or give the machine a role"
        )
    if "NoSuchBucket" in map(_code, chain):
        return f"there is no such bucket: {_line(error)}; create it, or mend the name"
    if any(isinstance(link, ConnectionError | TimeoutError) or _is(link, _OUT_OF_REACH) for link in chain):
        return (
            f"the store is out of reach: {_line(chain[-1])}; check the address (AWS_ENDPOINT_URL where it is set) and "
            "the network, then run the same command again: it goes on where it was"
        )
    if isinstance(error, _ORDINARY):
        return None
    if any(isinstance(link, PermissionError) or getattr(link, "status", None) in (401, 403) for link in chain):
        return f"the store refuses: {_line(error)}; the credentials are wrong, have expired, or lack the right"
    if of_client or isinstance(error, OSError):
        return f"the store failed: {_line(error)}; run the same command again: it goes on where it was"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is(error: BaseException, names: set[str]) -> bool:
    return not names.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def _is_client(error: BaseException) -> bool:
    return any(f"{type(error).__module__}.".startswith(f"{package}.") for package in CLIENTS)


def _code(error: BaseException) -> str | None:
    """The error code of an answer of S3."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _line(error: BaseException) -> str:
    """The first line of what it says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
