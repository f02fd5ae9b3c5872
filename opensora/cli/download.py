"""Fetch published weights: ``python -m opensora.cli.download open-sora-v2 --to ckpts``.

Nothing is ever fetched but by this command. It goes on where it was stopped, asks for pinned revisions, and looks at
the sizes and digests that are known. Without a network it says which files to put where.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":
    signal_handler.listen_early()

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from opensora.cli.main import run_cli
from opensora.utils.command_line.arguments import Parser, place
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import SETS, PublishedFile, Repository
from opensora.utils.files.untrusted import TEXT, Each, mismatch, parse_json, parsing, read_small
from opensora.utils.files.user_files import try_output, write_whole

REVISIONS = "REVISIONS.json"  # repository -> commit that its files are of
CHUNK = 1 << 24


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m opensora.cli.download", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("sets", nargs="+", choices=SETS, metavar="SET", help=f"which: {', '.join(SETS)}")
    parser.add_argument("--to", type=place, required=True, help="folder to put the files in, as ckpts")
    args = parser.parse_args(argv)
    for name in dict.fromkeys(args.sets):
        download(name, args.to)
    return 0


def download(name: str, target: Path) -> None:
    """Fetch a set into a folder, and look whether it is whole.

    Raises:
        UserError: the folder cannot be written, or what was asked for cannot be had; with what to put where.
    """
    try_output(target, "--to", folder=True)
    for repository in SETS[name]:
        revision = repository.revision or _kept_revision(repository, target)
        with parsing(lambda reason, of=repository: _unreachable(of, target, reason)):  # type: ignore[misc]
            revision = revision or newest_revision(repository.name)
            _keep_revision(repository, revision, target)  # before the files, so that a stopped download goes on
            snapshot(repository.name, revision, target / repository.folder, repository.patterns)
        check_files(repository, target)
        announce(f"{target / repository.folder}: {repository.name} at {revision} is there")


def snapshot(name: str, revision: str, folder: Path, patterns: Sequence[str]) -> None:
    """Fetch the files of a commit; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download

    snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=list(patterns))


def newest_revision(name: str) -> str:
    """The commit that a repository is at."""
    from huggingface_hub import HfApi

    return str(HfApi().model_info(name).sha)


def check_files(repository: Repository, target: Path) -> None:
    """That the files are there, and are those that were published as far as that is known.

    Raises:
        UserError: one is not, with what to do.
    """
    for file, known in repository.files.items():
        path = repository.path_of(file, target)
        if not path.is_file():
            # Without a network the library returns the folder as it is, without an error.
            raise _unreachable(repository, target, f"{path.name} did not come")
        if problem := _difference(path, known):
            raise UserError(f"{path}: {problem}; remove it and start the same command again")


def _difference(path: Path, known: PublishedFile) -> str | None:
    size = path.stat().st_size
    if known.size is not None and size != known.size:
        return f"has {size} bytes, {known.size} were published"
    if known.sha256 is None:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    found = digest.hexdigest()
    return None if found == known.sha256 else f"has SHA-256 {found}, {known.sha256} was published"


def _unreachable(repository: Repository, target: Path, reason: str) -> UserError:
    wanted = ", ".join(str(repository.path_of(file, target)) for file in repository.patterns)
    login = ""
    if repository.gated and "HF_TOKEN" not in os.environ:
        login = " accept its licence there and set HF_TOKEN, or"
    return UserError(
        f"{repository.page}: cannot be fetched ({reason});{login} start the same command where there is a network, or "
        f"put its files here yourself: {wanted}"
    )


def _kept_revision(repository: Repository, target: Path) -> str | None:
    """The commit of an earlier download, so that one that was stopped goes on with the same files."""
    return _revisions(target).get(repository.name)


def _keep_revision(repository: Repository, revision: str, target: Path) -> None:
    kept = _revisions(target) | {repository.name: revision}
    text = json.dumps(kept, indent=1, sort_keys=True)
    write_whole(target / REVISIONS, lambda file: file.write(f"{text}\n"))


def _revisions(target: Path) -> dict[str, str]:
    path = target / REVISIONS

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: cannot be read ({why}); remove it to take the newest files")

    if not path.exists():
        return {}
    with parsing(refuse):
        found = parse_json(read_small(path), refuse)
    if wrong := mismatch(found, Each(TEXT)):
        raise refuse(wrong)
    return dict(found)


if __name__ == "__main__":
    run_cli(main)
