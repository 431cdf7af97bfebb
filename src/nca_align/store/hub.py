"""The Hugging Face Hub, where there may be no network: what is cached is used, and what isn't is said at once."""

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from ..errors import UserError, one_line


def go_offline_without_network() -> None:
    """Tell the Hub's clients that they are offline, where the Hub can't be reached.

    They would try for half a minute otherwise, file by file. Behind a proxy only they can tell: they are left to it.
    """
    import datasets
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    address = urlparse(hub.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def download_file(repo: str, kind: str, file: str, what: str) -> str:
    """The path of a file of the Hub, downloaded or cached.

    Args:
        repo, kind, file: the repository, its type (`dataset` or `space`), and the file in it.
        what: the beginning of the sentence where it can't be had.

    Raises:
        UserError: it can't be had.
    """
    from huggingface_hub import hf_hub_download

    go_offline_without_network()
    try:
        return hf_hub_download(repo, file, repo_type=kind)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}, {file} of the {kind} {repo}, can't be loaded from the Hugging Face Hub "
            f"({one_line(error)[:200]}); give the path of a copy"
        ) from error


def adapter_folder(name: str) -> str | None:
    """The folder of the adapter that an id of the Hub names, downloaded or cached; None of any other id or a folder.

    Raises:
        UserError: it is an adapter, and can't be had.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    if Path(name).exists():
        return None
    go_offline_without_network()
    try:
        if find_adapter_config_file(name) is None:
            return None
    except (OSError, ValueError):  # no such repository, which loading says
        return None
    files = ["adapter_*", "*token*", "*.jinja", "vocab.*", "merges.txt", "*.model"]
    try:
        return snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"the adapter {name} can't be loaded from the Hugging Face Hub ({one_line(error)[:200]}); give the path of "
            "a copy"
        ) from error


def push(folder: Path, repository: str) -> bool:
    """Send an exported folder to a repository of the Hub, which is made, private, where there is none.

    Returns:
        Whether the repository is private; one that was there before may not be.

    Raises:
        UserError: the Hub didn't take it; the folder stays.
    """
    from huggingface_hub import HfApi

    go_offline_without_network()
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        private = bool(HfApi().model_info(repository).private)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`push` {repository}: the Hub did not take it ({one_line(error)[:200]}). The model is in {folder}, and "
            f"`hf upload {repository} {folder}` sends it later."
        ) from error
    return private
