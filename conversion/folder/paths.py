# SPDX-License-Identifier: Apache-2.0
"""Where an output lies, and what must not lie there: every command that writes one asks here.

Paths are compared by what the file system says they are: two names of one folder are one folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from ..errors import CMoEError, RequestError

SUFFIX = ".partial"
"""What unfinished work is called, behind the name of its output."""
DEEPEST = 256
"""Bytes that a path has at most below an output."""


def resolved(path: str | Path) -> Path:
    """Return where an output will be: a link to a folder stays a link, and the work lands there.

    Raises `RequestError` for a link that leads to itself, the root, and a name that is too long.
    """
    try:
        found = Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{path} cannot be an output folder: {error}.") from error
    if not found.name:
        raise RequestError(f"{path} cannot be an output folder: give a folder in it.")
    parent, longest, deepest = existing_parent(found), 255, 4096
    with suppress(OSError, AttributeError):  # Windows has no pathconf
        longest, deepest = (os.pathconf(parent, f"PC_{kind}_MAX") for kind in ("NAME", "PATH"))
    most = longest - len(SUFFIX)
    if max(len(os.fsencode(part)) for part in found.parts) > most:
        raise RequestError(
            f"the output {found.name[:20]}..., or a folder above it, has a name of more than "
            f"{most} bytes. Choose a shorter one."
        )
    if len(os.fsencode(found)) > deepest - DEEPEST:
        raise RequestError(
            f"the path of the output {found.name} has more than {deepest - DEEPEST} bytes. Choose "
            "a shorter one."
        )
    return found


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path, or file in its place, that exists."""
    return next(parent for parent in path.parents if os.path.exists(parent))


def check_apart(output: Path, inputs: Mapping[str, str | Path | None], *others: Path) -> None:
    """Raise `RequestError` for an output that is, holds or lies in something that the work reads.

    `inputs` are by what to call them, and may be elsewhere than on this disk; `others` are further
    folders that the work empties or removes.
    """
    for what, name in inputs.items():
        path = None if name is None else Path(name).expanduser()
        if path is None or not os.path.exists(path):
            continue
        if same(output, path):
            raise RequestError(f"the output folder is {what} itself. Choose another one.")
        if lies_in(output, path):
            raise RequestError(f"the output folder {output} lies in {what}. Choose another one.")
        parts = [path, *path.iterdir()] if path.is_dir() else [path]  # which may be links
        for folder in (output, *others):
            if any(lies_in(part, folder) for part in parts):
                raise RequestError(
                    f"{what} lies in {folder}, which the work would replace. Choose another "
                    "output folder, or move it."
                )


def same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file or folder, which exists."""
    with suppress(OSError):
        return one.samefile(other)
    return False


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or lies in it, by whatever names."""
    places = (path.absolute(), path.resolve())  # where its name is, and where it leads
    return any(same(it, folder) for place in places for it in (place, *place.parents))


def check_place(*folders: Path) -> None:
    """Raise `RequestError` for folders that cannot be created, or be given another name."""
    # `os.path.ismount` misses a folder bound to its own disk.
    mounted = {Path(disk.mountpoint) for disk in psutil.disk_partitions(all=True)}
    for folder in folders:
        if folder in mounted:
            raise RequestError(
                f"{folder} is a mount point (a volume), which cannot be replaced as a whole: give "
                f"a folder in it, for example {folder / 'model'}."
            )
        for point in mounted:
            if folder in point.parents and os.path.exists(folder):
                raise RequestError(
                    f"{folder} holds a mount point ({point}): unmount it, or choose another "
                    "output folder."
                )
        parent = existing_parent(folder)
        if not parent.is_dir():
            raise RequestError(f"cannot create {folder.name}: {parent} is not a folder.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RequestError(f"cannot create {folder.name}: {parent} cannot be written to.")


def replace_file(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write a file under another name, to the disk, then give it its own: it is never half of it.

    `content` may be a function that writes the file it is given. Raises `CMoEError`.
    """
    new = path.with_name(path.name + ".new")
    if isinstance(content, str):
        content = content.encode()
    try:
        new.write_bytes(content) if isinstance(content, bytes) else content(new)
        with open(new, "r+b") as file:  # Windows syncs only what can be written
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise CMoEError(f"cannot write {path.name} in {path.parent}: {error}.") from error
    finally:
        new.unlink(missing_ok=True)


def replace_folder(new: Path, target: Path, old: Path) -> None:
    """Move the folder `new` to `target`, and what was there to `old`, or neither of them.

    Raises `CMoEError`.
    """
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise CMoEError(f"cannot put {target.name} into {target.parent}: {error}.") from error


def remove(paths: Iterable[Path]) -> None:
    """Remove files, links and whole folders."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
