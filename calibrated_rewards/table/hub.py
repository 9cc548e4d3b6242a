"""Tables on the Hugging Face Hub."""

from __future__ import annotations

import os

from calibrated_rewards.table.storage import DATA_FILE, SUMMARY_FILE


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str = "dataset",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> str:
    """The directory in the local cache that the table of a repository was downloaded to."""
    from huggingface_hub import snapshot_download

    return snapshot_download(
        repo_id,
        repo_type=repo_type,
        revision=revision,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        token=token,
        allow_patterns=[DATA_FILE, SUMMARY_FILE],
    )


def upload(
    directory: str,
    repo_id: str,
    *,
    private: bool | None = None,
    repo_type: str = "dataset",
    revision: str | None = None,
    commit_message: str = "Upload reference table",
    token: str | bool | None = None,
) -> str:
    """Upload the table in a directory, to a new repository if there is none, and return the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        repo_type=repo_type,
        folder_path=directory,
        allow_patterns=[DATA_FILE, SUMMARY_FILE],
        revision=revision,
        commit_message=commit_message,
    )
    return str(commit.commit_url)
