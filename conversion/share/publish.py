# SPDX-License-Identifier: Apache-2.0
"""Upload a model's folder to the Hub, checked before and compared afterwards."""

import fnmatch
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CMoEError, RequestError
from ..folder.auxiliary_files import read_card
from ..folder.card import CARD_FILE, stated
from ..folder.paths import replace_file
from ..options import with_options
from .verify import verify
from .vetting import check_card, check_complete, check_private, files_to_publish

Answer = TypeVar("Answer")
LOADABLE = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
    *("*.py", "*.json", "*.jinja", "*.model", "*.txt"),
)
"""Files that a loader may pick up: left over from another model they would be mixed with this."""
WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds before each further attempt, where the server does not say how long."""
LONGEST_WAIT = 600
"""Seconds beyond which a server's Retry-After is no invitation to wait."""
HIDDEN = [".*", "*/.*"]
MESSAGE = "Upload a CMoE model"
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
    """Open a draft pull request instead."""
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
    folder, repository, revision = options.folder, options.repository, options.revision
    public, pull_request, replace = options.public, options.pull_request, options.replace
    licence, base_model, dry_run = options.licence, options.base_model, options.dry_run
    trust_remote_code = options.trust_remote_code
    here = Path(folder).expanduser()
    if not here.is_dir():
        raise RequestError(f"there is no folder {folder}.")
    if repository.count("/") != 1:
        raise RequestError(f"{repository!r} is not the name of a repository: give OWNER/NAME.")
    if pull_request and revision is not None:
        raise RequestError("a pull request goes to main: give either --pr or --revision.")
    names = files_to_publish(here)
    card = vetted_card(here, names, repository, licence=licence, base_model=base_model)
    if not (found := verify(here, trust_remote_code=trust_remote_code)).as_carved:
        raise RequestError(f"{found.line} Renew its code with `cmoe upgrade`, or carve it again.")
    api, branch, commit = HfApi(), revision or "main", None
    with explained(repository):
        patiently(api.whoami)
        was_private, before = look(api, repository, branch, here)
        foreign = sorted({*before.missing_paths} - {".gitattributes"}) if before else []
        deleted = [name for name in foreign if is_loadable(name)]
        if deleted and not replace:
            raise RequestError(
                f"{repository} holds files of another model, which would be mixed with this one: "
                f"{', '.join(deleted)}. Pass --replace to delete them, or choose another name."
            )
        if not dry_run:
            if licence or base_model:  # nobody asked for another card otherwise
                replace_file(here / CARD_FILE, card)
            if was_private is None:
                patiently(api.create_repo, repository, private=not public, exist_ok=True)
            branch = make_revision(api, repository, branch, pull_request)
            commit = send(api, repository, branch, here, deleted)
            check_arrived(api, repository, commit, here, names)
    return Publication(
        url=url_of(api, repository, branch),
        commit=commit,
        repository=repository,
        revision=branch,
        private=not public if was_private is None else was_private,
        files=len(names),
        bytes=sum((here / name).stat().st_size for name in names),
        replaced=sorted({it["path"] for it in before.mismatches} & {*names}) if before else [],
        deleted=deleted,
        left=[name for name in foreign if name not in deleted],
        dry_run=dry_run,
    )


def vetted_card(
    folder: Path, names: list[str], repository: str, *, licence: str | None, base_model: str | None
) -> str:
    """Check everything that can be checked here. Return the text that the card is to have."""
    check_complete(folder)
    if CARD_FILE not in names:
        raise RequestError(f"{folder.name} has no {CARD_FILE}: a model needs a card.")
    text = read_card(folder)
    card = stated(text, licence=licence, base_model=base_model) if licence or base_model else text
    check_card(folder, card)
    check_private(folder, names, card, known={repository.partition("/")[0]})
    return card


def look(api: HfApi, repository: str, branch: str, folder: Path) -> tuple[bool | None, Any]:
    """Return whether the repository is private, and its files compared with the folder's.

    Either is None where there is none.
    """
    try:
        private = bool(patiently(api.model_info, repository).private)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None, None
    for revision in (branch, "main"):  # a new branch starts as main
        try:
            return private, compare(api, repository, revision, folder)
        except RevisionNotFoundError:
            continue
    return private, None


def compare(api: HfApi, repository: str, revision: str, folder: Path) -> Any:
    """Compare the checksums of all files."""
    return patiently(api.verify_repo_checksums, repository, revision=revision, local_dir=folder)


def make_revision(api: HfApi, repository: str, branch: str, pull_request: bool) -> str:
    """Make the branch or the pull request. Return the revision to upload to."""
    if pull_request:  # not repeated: a lost answer would open a second one
        return str(api.create_pull_request(repository, MESSAGE).git_reference)
    if branch != "main" and not branch.startswith("refs/"):
        patiently(api.create_branch, repository, branch=branch, exist_ok=True)
    return branch


def send(api: HfApi, repository: str, branch: str, folder: Path, delete: list[str]) -> str:
    """Upload the folder and delete some files. Return the commit."""
    done = patiently(
        api.upload_folder,
        repo_id=repository,
        folder_path=folder,
        revision=branch,
        commit_message=MESSAGE,
        ignore_patterns=HIDDEN,
        delete_patterns=delete or None,
    )
    return str(done.oid)


def check_arrived(api: HfApi, repository: str, commit: str, folder: Path, names: list[str]) -> None:
    """Compare what the Hub has with what was sent. Raises `CMoEError`."""
    found = compare(api, repository, commit, folder)
    wrong = {*found.extra_paths, *(it["path"] for it in found.mismatches)} & set(names)
    if wrong:
        raise CMoEError(
            f"{repository} does not have what was sent: {', '.join(sorted(wrong))} differ at "
            f"commit {commit[:7]}. Do not use it. {GO_ON}"
        )


def is_loadable(name: str) -> bool:
    """Whether a loader would look at a file of a repository."""
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in LOADABLE)


def url_of(api: HfApi, repository: str, branch: str) -> str:
    """Return where people find it."""
    base = f"{api.endpoint}/{repository}"
    if branch.startswith("refs/pr/"):
        return f"{base}/discussions/{branch.rpartition('/')[2]}"
    return base if branch == "main" else f"{base}/tree/{branch}"


def patiently(call: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
    """Repeat a request that the Hub answers with 429 or 5xx, or that the network loses.

    The library repeats only some of its requests. All that go through here can be repeated without
    harm: an upload of what is there already makes no second commit.
    """
    for wait in WAITS:
        try:
            return call(*arguments, **options)
        except Exception as error:
            answer = error.response if isinstance(error, HfHubHTTPError) else None
            # The library's own client is httpx or httpx2, depending on its version.
            lost = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
            if not lost and (answer is None or not is_passing(answer.status_code)):
                raise
            asked = answer.headers.get("Retry-After", "") if answer is not None else ""
            seconds = float(asked) if asked.isdigit() else wait
            if seconds > LONGEST_WAIT:
                raise
            time.sleep(seconds)
    return call(*arguments, **options)


def is_passing(status: int) -> bool:
    """Whether trying again may help."""
    return status == 429 or status >= 500


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn failures of the Hub into one clear line."""
    try:
        yield
    except CMoEError:
        raise
    except Exception as error:  # of the Hub's library, of its HTTP library, of its threads
        cause = error
        while not isinstance(cause, HfHubHTTPError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise explanation(cause, repository) from error


def explanation(error: Exception, repository: str) -> CMoEError:
    """Return what a failure of the Hub means."""
    login = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    if isinstance(error, LocalTokenNotFoundError):
        return RequestError(f"the Hub needs a token, and none was found. {login}")
    if isinstance(error, HFValidationError):
        return RequestError(f"{repository!r} is not a valid name on the Hub: {error}")
    if not isinstance(error, HfHubHTTPError):
        return CMoEError(f"the upload to {repository} broke off: {error}. {GO_ON}")
    status = error.response.status_code
    if is_passing(status):
        return CMoEError(f"the Hub answered {status} to {repository} again and again. {GO_ON}")
    reasons = {
        401: f"the Hub does not accept the token: it has expired or is wrong. {login}",
        403: f"the token may not write to {repository}. {login}",
    }
    refusal = f"the Hub refuses {repository}: {error.server_message or f'status {status}'}"
    return RequestError(reasons.get(status, refusal))
