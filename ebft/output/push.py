"""A finished folder on the hub: the files that its run made, and no others; folders of this machine are not named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ebft.errors import EBFTError, first_line
from ebft.files import read_json
from ebft.output.figures import without_folder
from ebft.output.records import SUMMARY


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a finished run's folder, which is made if the hub has none of that name; gives its address.

    Raises:
        EBFTError: nobody is logged in, ``repo`` can be no name, or the hub refuses.
    """
    check_repo(repo)
    token = get_token()
    if token is None:
        raise EBFTError("nobody is logged in to the hub: run hf auth login, or set HF_TOKEN to a token that may write")
    api = HfApi(token=token)
    try:
        with tempfile.TemporaryDirectory(prefix="ebft-push-") as made:
            stage = _staged(folder, Path(made))
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=stage, commit_message="Pruned and recovered by ebft")
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = first_line(error).replace(token, "…").rstrip(".")
        raise EBFTError(f"{folder} cannot be pushed to {repo}: {said}") from None
    return str(address)


def check_repo(repo: str) -> None:
    """``EBFTError`` if ``repo`` is not USER/NAME, as the hub has it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise EBFTError(f"{repo!r} can be no repository: {first_line(error).rstrip('.')}") from None
    if repo.count("/") != 1:
        raise EBFTError(f"{repo!r} can be no repository; expected USER/NAME")


def _staged(folder: Path, stage: Path) -> Path:
    """Links to the files that the run made; the summary is rewritten, with names in place of paths."""
    summary = read_json(folder / SUMMARY, SUMMARY)
    for name in summary.get("files", []):
        place = stage / name
        if not isinstance(name, str) or not place.resolve().is_relative_to(stage.resolve()):
            raise ValueError(f"{SUMMARY} lists {name!r}, which is no file of the folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        source = folder / name
        if source.is_symlink() or not source.is_file():
            raise ValueError(f"{name} is no file any more")
        place.symlink_to(source.resolve())
    (stage / SUMMARY).unlink(missing_ok=True)
    (stage / SUMMARY).write_text(json.dumps(_without_folders(summary), indent=2, ensure_ascii=False), encoding="utf-8")
    return stage


def _without_folders(value: Any) -> Any:
    """Names in place of paths, in all that JSON holds."""
    if isinstance(value, dict):
        return {without_folder(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return without_folder(value)
