"""Fetch published weights: ``python -m opensora.cli.download open-sora-v2 --to ckpts``.

Nothing is ever fetched but by this command. It goes on where it was stopped, within a file too, takes pinned commits
where they are known and says where they are not, and compares sizes and digests with those that were published. Without
a network it says which files to put where.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.listen_early()

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora.cli.main import run_cli
from opensora.utils.command_line.arguments import Parser, place, word
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files import hub
from opensora.utils.files.published_files import SETS, PublishedFile, Repository
from opensora.utils.files.untrusted import (
    COUNT,
    SHA256,
    TEXT,
    Each,
    mismatch,
    parse_json,
    parsing,
    read_small,
    short_reason,
)
from opensora.utils.files.user_files import try_output, write_whole

REVISIONS = "REVISIONS.json"  # repository -> commit that its files are of
LISTING = "FILES.json"  # repository -> its commit, and size and digest of each file, so that no network is needed again
_LISTED = Each({"commit": TEXT, "files": Each({"size": COUNT, "sha256?": SHA256, "git_blob?": TEXT})})
CHUNK = 1 << 24
_COMMIT = re.compile("[0-9a-f]{40}")


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.download", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("sets", nargs="+", choices=SETS, metavar="SET", help=f"which: {', '.join(SETS)}")
    parser.add_argument("--to", type=place, required=True, help="folder to put the files in, as ckpts")
    parser.add_argument("--revision", type=word, help="commit, tag or branch in place of the one that is taken")
    args = parser.parse_args(argv)
    sets = list(dict.fromkeys(args.sets))
    names = [repository.name for name in sets for repository in SETS[name]]
    if args.revision and len(names) > 1:
        raise UserError(f"--revision={args.revision}: must be of one repository, not {', '.join(names)}; name one set")
    for name in sets:
        download(name, args.to, args.revision)
    return 0


def download(name: str, target: Path, revision: str | None = None) -> None:
    """Fetch the files of a set that are not in a folder yet.

    Args:
        revision: in place of the pinned commit, or of the newest where none is pinned.

    Raises:
        UserError: the folder cannot be written, or what was asked for cannot be had; with what to put where. Or a file
            that is there is not the one that was published; nothing is fetched then.
    """
    try_output(target, "--to", folder=True)
    for repository in SETS[name]:
        with parsing(lambda reason, of=repository: _unreachable(of, target, reason)):  # type: ignore[misc]
            commit = _commit(repository, target, revision)
        files = _files(repository, commit, target)
        _keep(target / REVISIONS, _read(target / REVISIONS, Each(TEXT)) | {repository.name: commit})
        missing = compare(repository, files, target)
        _require_room({repository.path_of(file, target): files[file] for file in missing}, target)
        for file in missing:
            fetch(repository, commit, file, files[file], target)
        announce(f"{target / repository.folder}: {repository.name} at {commit} is there")


def _commit(repository: Repository, target: Path, revision: str | None) -> str:
    """The commit to take; what is not pinned is said, and stays what it was at the first download."""
    kept = _read(target / REVISIONS, Each(TEXT))
    commit = revision or repository.revision or kept.get(repository.name)
    if commit is None or not _COMMIT.fullmatch(commit):
        commit = hub.commit_of(repository.name, commit)
    if not (revision or repository.revision):
        since = "that of the first download" if repository.name in kept else "its newest"
        announce(
            f"{repository.name}: no commit of it is pinned here; {commit}, {since}, is taken and kept in "
            f"{target / REVISIONS}; give --revision COMMIT for another"
        )
    return commit


def _files(repository: Repository, commit: str, target: Path) -> dict[str, PublishedFile]:
    """What a commit holds of a set: as the hub lists it, or listed it before; what is known here goes first.

    Raises:
        UserError: the hub does not answer and files are missing, or it has other files than it should.
    """
    table = (
        repository.files if repository.revision in (None, commit) else dict.fromkeys(repository.files, PublishedFile())
    )
    kept = _read(target / LISTING, _LISTED)
    listed = kept.get(repository.name, {})
    if listed.get("commit") == commit:
        found = {file: PublishedFile(**known) for file, known in listed["files"].items()}
    else:
        try:
            found = hub.list_files(repository.name, commit, repository.patterns)
        except Exception as error:
            return _without_listing(repository, table, target, error)
        stated = {file: {k: v for k, v in asdict(known).items() if v is not None} for file, known in found.items()}
        _keep(target / LISTING, kept | {repository.name: {"commit": commit, "files": stated}})
    for file in found:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{repository.page}: lists a file outside of its folder, {file!r}; nothing was fetched")
    for file in table:
        if file not in found:
            raise UserError(f"{repository.page}: has no {file} at {commit}; give --revision of a commit that has it")
    return {file: _joined(known, table.get(file, PublishedFile())) for file, known in found.items()}


def _joined(listed: PublishedFile, known: PublishedFile) -> PublishedFile:
    """What is known of a file here, and where nothing is, what the hub says."""
    fields = asdict(listed) | {key: value for key, value in asdict(known).items() if value is not None}
    return PublishedFile(**fields)


def _without_listing(
    repository: Repository, table: dict[str, PublishedFile], target: Path, error: Exception
) -> dict[str, PublishedFile]:
    """Files that somebody has put there are taken where the hub does not answer."""
    with parsing(lambda reason: _unreachable(repository, target, reason)):
        if not all(repository.path_of(file, target).is_file() for file in table):
            raise error
    announce(
        f"{repository.page}: does not answer ({short_reason(error)}); files that are there are compared with what is "
        "known here alone"
    )
    return table


def compare(repository: Repository, files: dict[str, PublishedFile], target: Path) -> list[str]:
    """The files that are not there yet.

    Raises:
        UserError: one that is there is not the one that was published, with what to do.
    """
    missing = []
    for file, known in files.items():
        path = repository.path_of(file, target)
        if not path.exists():
            missing.append(file)
        elif problem := _difference(path, known):
            raise UserError(f"{path}: {problem}; remove it and start the same command again")
    return missing


def fetch(repository: Repository, commit: str, file: str, known: PublishedFile, target: Path) -> None:
    """Fetch one file, or the rest of it, beside its place; put it there when it is whole and what was published.

    Raises:
        UserError: it cannot be had, or something else came.
    """
    path = repository.path_of(file, target)
    with _alone(path, known) as part:
        with parsing(lambda reason: _unreachable(repository, target, reason)):
            hub.append_rest(repository.name, commit, file, known.size or 0, part)
        if problem := _difference(part, known):
            part.unlink()
            raise UserError(f"{path}: came wrong, {problem}; start the same command again")
        os.replace(part, path)


@contextmanager
def _alone(path: Path, known: PublishedFile) -> Iterator[Path]:
    """The place for what is there of a file; nobody else writes there meanwhile."""
    part = _beginning_of(path, known)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = part.open("ab")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({short_reason(error)}); give another --to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is fetching it; wait for that, or give another --to") from None
        yield part


def _beginning_of(path: Path, known: PublishedFile) -> Path:
    """Where the beginning of a file lies; named by its content, so that no other file is ever gone on with."""
    content = known.sha256 or known.git_blob or str(known.size)
    return path.with_name(f".{path.name}.{content[:16]}.part")


def _require_room(missing: dict[Path, PublishedFile], target: Path) -> None:
    """Raises UserError if the disk has no room for what is not there yet."""
    beginnings = [_beginning_of(path, known) for path, known in missing.items()]
    there = sum(part.stat().st_size for part in beginnings if part.is_file())
    needed = sum(known.size or 0 for known in missing.values()) - there
    free = shutil.disk_usage(target).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free"
        raise UserError(f"--to={target}: {sizes}; name a place with room")


def _difference(path: Path, known: PublishedFile) -> str | None:
    """How a file differs from what was published, as far as that is known."""
    size = path.stat().st_size
    if known.size is not None and size != known.size:
        return f"has {size} bytes, {known.size} were published"
    if known.sha256 is not None:
        return _other_digest(path, "SHA-256", hashlib.sha256(), known.sha256)
    if known.git_blob is not None:
        return _other_digest(path, "git's SHA-1", hashlib.sha1(b"blob %d\0" % size), known.git_blob)
    return None


def _other_digest(path: Path, kind: str, digest: Any, published: str) -> str | None:
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    found = digest.hexdigest()
    return None if found == published else f"has {kind} {found}, {published} was published"


def _unreachable(repository: Repository, target: Path, reason: str) -> UserError:
    wanted = ", ".join(str(repository.path_of(file, target)) for file in repository.patterns)
    login = ""
    if repository.gated and "HF_TOKEN" not in os.environ:
        login = " accept its licence there and set HF_TOKEN, or"
    return UserError(
        f"{repository.page}: cannot be fetched ({reason});{login} start the same command where there is a network, or "
        f"put its files here yourself: {wanted}"
    )


def _read(path: Path, shape: Any) -> dict[str, Any]:
    """What an earlier download has kept; empty: none was here."""

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: cannot be read ({why}); remove it to take the newest files")

    if not path.exists():
        return {}
    with parsing(refuse):
        found = parse_json(read_small(path), refuse)
    if wrong := mismatch(found, shape):
        raise refuse(wrong)
    return dict(found)


def _keep(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True)
    write_whole(path, lambda file: file.write(f"{text}\n"))


if __name__ == "__main__":
    run_cli(main)
