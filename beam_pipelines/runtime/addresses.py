"""Addresses of stores and sources: checked, and Beam's file systems prepared for them, before anything is read."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from schemas.errors import DefinitionError, StoreError
from transforms.storage.bounded import NoResponse, first_contact
from transforms.storage.file_systems import FileSystems

log = logging.getLogger("millrace")

# Object stores that both Beam and delta-rs support: the module that Beam needs for each, and the package that installs
# it.
REMOTE = {
    "gs": ("google.cloud.storage", "pip install 'apache-beam[gcp]'"),
    "s3": ("boto3", "pip install 'apache-beam[aws]'"),
}


def usable_address(flag: str, address: str, beam_args: Sequence[str]) -> str:
    """`address` in the form that pipelines take: a path, or an address in an object store that this process can use.

    Args:
        flag: the flag that has the address, for messages.
        beam_args: flags for Beam; its file systems take their options from them.

    Raises:
        DefinitionError: it is not a path.
        StoreError: nothing can be stored at such an address, before anything was sent over the network; or the object
            store does not respond.
    """
    if not address or "\0" in address:
        raise DefinitionError(
            f"{flag} must name a folder, or an address that begins with gs:// or s3://", f"it is {address!r}"
        )
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise StoreError(f"{flag} must name a folder, or an address", f"{address!r}: {error}", "Correct it") from None
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    if parts.scheme not in REMOTE:
        raise StoreError(
            f"{flag} must name a folder, or an address that begins with gs:// or s3://",
            f"it is {address!r}",
            "Name a folder that is mounted here, or a bucket",
        )
    if not parts.netloc:
        raise StoreError(
            f"{flag} must name a bucket", f"it is {address!r}", f"Write it like {parts.scheme}://bucket/folder"
        )
    module, install = REMOTE[parts.scheme]
    if not _installed(module):
        raise StoreError(f"{flag} with {parts.scheme}:// needs the package {module}", "it is not installed", install)
    _prepare_beam(beam_args)
    _require_response(flag, address.rstrip("/"))
    return address.rstrip("/")


@functools.lru_cache(16)
def _require_response(flag: str, address: str) -> None:
    """Asks the object store once, where its libraries would try for minutes.

    Raises:
        StoreError: it does not respond.  Whoever uses it gets its other errors.
    """
    try:
        first_contact(lambda: FileSystems.exists(address))
    except NoResponse as error:
        raise StoreError(
            f"The object store that {flag} names must be reachable",
            f"{address}: {error}",
            "Check the address, the network and the credentials",
        ) from None
    except Exception as error:
        log.debug("%s: %s", address, error)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above the module
        return False


def _prepare_beam(beam_args: Sequence[str]) -> None:
    """Gives Beam's file systems their options; a pipeline would do so only when it is created."""
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    FileSystems.set_options(PipelineOptions(list(beam_args)))
    # These log a traceback for each attempt, and that there are no credentials.
    for name in ("apache_beam.utils.retry", "apache_beam.internal.gcp.auth"):
        logging.getLogger(name).setLevel(logging.ERROR)


def local_path(path: str) -> str:
    """An absolute path; an address in an object store stays unchanged."""
    return path if "://" in path else os.path.abspath(path)
