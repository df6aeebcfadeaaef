"""A whole repository of the hub in a folder here: where it already is, and how it gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shared.errors import UserError
from shared.weights import hub
from shared.weights.downloads import DownloadProgress, download
from shared.weights.files import Folders, in_repository


def copies(repository: str, folders: Folders, marker: str) -> Iterator[Path]:
    """The folders that hold OWNER/NAME or a part of it: the user's, then the hub's cache. marker: a file in
    its root.
    """
    source = f"{hub.SCHEME}{repository}/{marker}"
    found = [*in_repository(source, folders), hub.in_cache(source)]
    yield from (path.parent for path in found if path is not None and path.is_file())


def fetch(
    repository: str,
    folder: Path,
    patterns: Sequence[str],
    progress: Callable[[DownloadProgress], None] | None = None,
) -> None:
    """Have the repository's files whose names fit one of `patterns` in `folder`, all of its newest commit.

    What is there stays. UserError when the hub does not give them.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import filter_repo_objects

    if hub.is_offline():
        raise UserError(
            f"{repository} is not on this computer and HF_HUB_OFFLINE is set: run "
            f"hf download {repository} where there is a network, or unset HF_HUB_OFFLINE."
        )
    try:
        told = HfApi().model_info(repository)
    except hub.network_error() as error:
        raise UserError(f"{repository} cannot be had from the hub ({_first_line(error)}).") from error
    names = filter_repo_objects([one.rfilename for one in told.siblings or []], allow_patterns=list(patterns))
    addresses = {folder / name: hf_hub_url(repository, name, revision=told.sha) for name in names}
    if outside := [path for path in addresses if not path.resolve().is_relative_to(folder.resolve())]:
        raise UserError(f"{repository} has the file '{outside[0]}', which leads out of {folder}.")
    download(addresses, folder, progress)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
