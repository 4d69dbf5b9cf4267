# SPDX-License-Identifier: Apache-2.0
"""Upload a model's folder to the Hub, checked before and compared afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CMoEError, RequestError
from ..folder.card import CARD_FILE
from ..folder.paths import replace_file
from ..options import with_options
from .verify import verify
from .vetting import check_folder, matches

LOADABLE = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
    *("*.py", "*.json", "*.jinja", "*.model", "*.txt"),
)
"""Files that a loader may pick up: left over from another model they would be mixed with this."""
GO_ON = "Run the same command again: what has arrived is not sent twice."


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published, or would be; the keys of `cmoe publish --json`."""

    url: str
    """Of the repository, branch or pull request."""
    commit: str | None
    """None for a dry run."""
    repository: str
    revision: str
    private: bool
    files: int
    bytes: int
    replaced: list[str]
    """Files of the repository that were overwritten because they differed."""
    deleted: list[str]
    left: list[str]
    """Files of the repository that are not part of this model and stay."""
    dry_run: bool


@dataclass(frozen=True)
class PublishOptions:
    """The options of `publish`."""

    folder: str | Path
    """Folder of a carved, recovered or exported model."""
    repository: str
    """OWNER/NAME on the Hub, created if need be."""
    _: KW_ONLY
    public: bool = False
    """Create the repository public, not private. An existing one stays what it is."""
    revision: str | None = None
    """Branch to upload to, created if need be, or refs/pr/N; default main."""
    pull_request: bool = False
    """Open a pull request instead."""
    replace: bool = False
    """Delete files of another model in the repository."""
    licence: str | None = None
    """Licence for the card, where it states none, for example llama2."""
    base_model: str | None = None
    """Hub id of the dense model, for the card."""
    dry_run: bool = False
    """Check everything, send nothing."""
    trust_remote_code: bool = False
    """Run the folder's code even if no release of this project has written it."""


@with_options(PublishOptions)
def publish(options: PublishOptions) -> Publication:
    """Upload a model's folder to the Hub, and compare what the Hub then has.

    Raises:
        RequestError: The folder is not fit to be published, or the Hub refuses the request.
        CMoEError: The Hub cannot be reached, or has something else afterwards.
    """
    folder, repository = Path(options.folder).expanduser(), options.repository
    if not folder.is_dir():
        raise RequestError(f"there is no folder {options.folder}.")
    if repository.count("/") != 1:
        raise RequestError(f"{repository!r} is not the name of a repository: give OWNER/NAME.")
    if options.pull_request and options.revision is not None:
        raise RequestError("a pull request goes to main: give either --pr or --revision.")
    names, card = check_folder(
        folder,
        owner=repository.partition("/")[0],
        licence=options.licence,
        base_model=options.base_model,
        trusted=options.trust_remote_code,
    )
    if not (found := verify(folder, trust_remote_code=options.trust_remote_code)).as_carved:
        raise RequestError(f"{found.line} Renew its code with `cmoe upgrade`, or carve it again.")
    api, branch, commit = HfApi(), options.revision or "main", None
    with explained(repository):
        api.whoami()
        private, before = existing(api, repository, branch, folder)
        foreign = sorted({*before.missing_paths} - {".gitattributes"}) if before else []
        deleted = [name for name in foreign if "/" not in name and matches(name, LOADABLE)]
        if deleted and not options.replace:
            raise RequestError(
                f"{repository} holds files of another model, which would be mixed with this one: "
                f"{', '.join(deleted)}. Pass --replace to delete them, or choose another name."
            )
        url = f"{api.endpoint}/{repository}" + f"/tree/{branch}" * (branch != "main")
        if branch.startswith("refs/pr/"):
            url = f"{api.endpoint}/{repository}/discussions/{branch.rpartition('/')[2]}"
        if not options.dry_run:
            if options.licence or options.base_model:
                replace_file(folder / CARD_FILE, card)
            if private is None:
                api.create_repo(repository, private=not options.public, exist_ok=True)
            if branch != "main" and not branch.startswith("refs/"):
                api.create_branch(repository, branch=branch, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=branch,
                commit_message="Upload a CMoE model",
                create_pr=options.pull_request,
                ignore_patterns=[".*", "*/.*"],
                delete_patterns=deleted or None,
            )
            commit, url, branch = done.oid, done.pr_url or url, done.pr_revision or branch
            check_arrived(api, repository, commit, folder, names)
    return Publication(
        url=url,
        commit=commit,
        repository=repository,
        revision=branch,
        private=not options.public if private is None else private,
        files=len(names),
        bytes=sum((folder / name).stat().st_size for name in names),
        replaced=sorted({it["path"] for it in before.mismatches} & {*names}) if before else [],
        deleted=deleted,
        left=[name for name in foreign if name not in deleted],
        dry_run=options.dry_run,
    )


def existing(api: HfApi, repository: str, branch: str, folder: Path) -> tuple[bool | None, Any]:
    """Return whether the repository is private, and its files compared with the folder's.

    Either is None where there is none.
    """
    try:
        private = bool(api.model_info(repository).private)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None, None
    for revision in (branch, "main"):  # a new branch starts as main
        try:
            return private, api.verify_repo_checksums(
                repository, revision=revision, local_dir=folder
            )
        except RevisionNotFoundError:
            continue
    return private, None


def check_arrived(api: HfApi, repository: str, commit: str, folder: Path, names: list[str]) -> None:
    """Compare what the Hub has with what was sent. Raises `CMoEError`."""
    found = api.verify_repo_checksums(repository, revision=commit, local_dir=folder)
    wrong = {*found.extra_paths, *(it["path"] for it in found.mismatches)} & set(names)
    if wrong:
        raise CMoEError(
            f"{repository} does not have what was sent: {', '.join(sorted(wrong))} differ at "
            f"commit {commit[:7]}. Do not use it. {GO_ON}"
        )


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn failures of the Hub into one clear line."""
    login = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    try:
        yield
    except CMoEError:
        raise
    except LocalTokenNotFoundError as error:
        raise RequestError(f"the Hub needs a token, and none was found. {login}") from error
    except HFValidationError as error:
        raise RequestError(f"{repository!r} is not a valid name on the Hub: {error}") from error
    except Exception as error:  # of the Hub's library, of its HTTP library, of its threads
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        if cause is None:
            raise CMoEError(f"the upload to {repository} broke off: {error}. {GO_ON}") from error
        status = cause.response.status_code
        if status == 429 or status >= 500:
            raise CMoEError(f"the Hub answered {status} to {repository}. {GO_ON}") from error
        reasons = {
            401: f"the Hub does not accept the token: it has expired or is wrong. {login}",
            403: f"the token may not write to {repository}. {login}",
        }
        refusal = f"the Hub refuses {repository}: {cause.server_message or f'status {status}'}"
        raise RequestError(reasons.get(status, refusal)) from error
