"""The Hugging Face hub through huggingface_hub: what an address means, what the hub tells of a file, and
what lies in its cache here.

Two forms of address: that of a file on the web (https://huggingface.co/OWNER/NAME/resolve/main/PATH), and
hf://OWNER/NAME/PATH for a file or folder of a repository that the user has got with `hf download`. The
library is imported where it is needed: it takes a quarter of a second, its constants next to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.version import VERSION

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata
    from huggingface_hub.utils import HfUri

SCHEME = "hf://"
PART_CONFIG = "config.json"  # every part of a pipeline has it in its folder


def address(source: str) -> HfUri | None:
    """Repository, revision and path of a hub address, of the web or hf://; None for anything else."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        return parse_hf_uri(source, endpoint=constants.ENDPOINT)
    except HfUriError:
        return None


def in_cache(source: str) -> Path | None:
    """Where `hf download` or another program has put this file, or this folder of a pipeline's part."""
    from huggingface_hub import constants

    if not Path(constants.HF_HUB_CACHE).is_dir():
        return None
    uri = address(source)
    if uri is None or not uri.path_in_repo:
        return None
    if file := _cached(uri, uri.path_in_repo):
        return file
    config = _cached(uri, f"{uri.path_in_repo}/{PART_CONFIG}")
    return None if config is None else config.parent


def _cached(uri: HfUri, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(uri.id, name, revision=uri.revision, repo_type=uri.type)
    except ValueError:  # a path that leads out of the repository
        return None
    return Path(found) if isinstance(found, str) else None


def is_offline() -> bool:
    """Whether the user forbids downloads (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def url(uri: HfUri) -> str:
    """Where to ask for a file: at the hub, or at the mirror that HF_ENDPOINT names."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision)


def page(uri: HfUri) -> str:
    """The repository's page, with its licence."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(uri.type, '')}{uri.id}"


def headers() -> dict[str, str]:
    """For requests to the hub; with the user's token, if there is one."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name="zgp", library_version=VERSION)


def metadata(address: str) -> HfFileMetadata:
    """Size and hash of a file of the hub. Raises `network_error()`, with a `response` where there was one."""
    from huggingface_hub import get_hf_file_metadata

    return get_hf_file_metadata(address, library_name="zgp", library_version=VERSION)


def network_error() -> type[Exception]:
    """What requests of huggingface_hub raise: it brings a client of its own from version 2 on."""
    from huggingface_hub import errors

    return errors.HTTPError
