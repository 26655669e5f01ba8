"""How does an exported folder get to a Hub of models? Through huggingface_hub, to HF_ENDPOINT.

The token is that of HF_TOKEN or of `hf auth login`; it is handed to the library and to nothing
else. A repository that holds another program's model is left alone.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

TAG = "mocov3-ds"
"""tag of the model card by which a repository of ours is known"""

_EMPTY = frozenset({".gitattributes", "README.md"})

T = TypeVar("T")


def check_repository(name: str) -> None:
    """Find out before hours of work whether a folder can be pushed.

    Args:
        name: repository that is to get the folder, USER/NAME.

    Raises:
        ValueError: an impossible name, no token, a Hub that does not answer, or a repository with
            another model in it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
        raise ValueError(f"--push {name!r} is no USER/NAME of a repository.")
    if get_token() is None:
        raise ValueError("--push needs a token: set HF_TOKEN, or run hf auth login.")
    repository = _ask_hub(lambda api: _describe_repository(api, name), name)
    if repository is None:
        return
    tags, files = repository
    if TAG not in tags and {*files} - _EMPTY:
        raise ValueError(
            f"{name} holds a model that was not exported here ({', '.join(sorted(files)[:4])}); "
            "give another name."
        )


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a folder as one commit; the repository is made if it is not there.

    Args:
        folder: folder that `export_encoder` wrote, with its model card.
        name: repository, USER/NAME, that `check_repository` let pass.
        private: whether a repository that is made is seen by its owner alone.

    Returns:
        Address of the repository.

    Raises:
        ValueError: the Hub refused it or does not answer; the folder stays as it is.
    """

    def upload(api: Any) -> str:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Encoder exported with mocov3-ds",
            repo_type="model",
        )
        return str(address)

    return _ask_hub(upload, name)


def _describe_repository(api: Any, name: str) -> tuple[list[str], list[str]] | None:
    """Tags and files of a repository; None where there is none."""
    try:
        model = api.model_info(name, timeout=30)
    except RepositoryNotFoundError:
        return None
    return list(model.tags or []), [file.rfilename for file in model.siblings or []]


def _ask_hub(question: Callable[[Any], T], name: str) -> T:
    """The answer of a Hub, or one sentence without the token."""
    endpoint, token = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, get_token()
    api = HfApi(endpoint=endpoint, token=token)
    try:
        return question(api)
    except Exception as error:  # of the library, its network and what a Hub answers
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if token:
            reason = reason.replace(token, "***")
        raise ValueError(
            f"{name} cannot be pushed to {api.endpoint} ({type(error).__name__}: {reason})."
        ) from None
