"""Uploads an export to a repository on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2vec_ds import __version__
from llm2vec_ds.errors import UserError
from llm2vec_ds.storage.output_folder import MANIFEST, written_files

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """The files to upload.

    Attributes:
        repository: `owner/name` on the hub.
        private: whether a new repository is private.
        files: maps each name on the hub to the local file.
    """

    repository: str
    private: bool
    files: dict[str, Path]


def check_repository(name: str) -> None:
    """Checks a repository's name, before anything is exported.

    Raises:
        UserError: it is not `owner/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if "/" not in name:
        raise UserError("--push needs a repository on the hub: give OWNER/NAME, such as my-team/my-encoder")


def files_of(output: Path, beside: Path) -> dict[str, Path]:
    """Returns the files to upload: those that the export wrote, and no other files in its folder.

    For a single file, the files in the folder `beside` go along.
    """
    if output.is_dir():
        return {name: output / name for name in sorted(written_files(output)) if name != MANIFEST}
    return {output.name: output, **{file.name: file for file in sorted(beside.iterdir())}}


def described(upload: Upload) -> str:
    """Returns the files' names and sizes in bytes, and the model card, as text."""
    sizes = {name: file.stat().st_size for name, file in upload.files.items()}
    width = max(map(len, sizes))
    visible = "private, if it is new" if upload.private else "public, if it is new"
    lines = [f"{upload.repository} ({visible}): {len(sizes)} files, {sum(sizes.values()):,} bytes"]
    lines += [f"  {name:{width}}  {size:>15,}" for name, size in sizes.items()]
    return "\n".join([*lines, "", upload.files[CARD].read_text(encoding="utf-8").rstrip()])


def push(upload: Upload) -> str:
    """Uploads all files in one commit, and returns the commit's address.

    Raises:
        UserError: the hub refuses the upload, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    added = [CommitOperationAdd(name, file) for name, file in upload.files.items()]
    try:
        api = HfApi()
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        commit = api.create_commit(
            upload.repository, added, commit_message=f"Exported by LLM2Vec-DS {__version__}"
        )
    except (HfHubHTTPError, OSError) as error:
        said = getattr(error, "server_message", None) or str(error)
        reason = " ".join(said.split())[:200]
        raise UserError(f"--push {upload.repository}: {reason}. Log in with `hf auth login`") from None
    return str(commit.commit_url)
