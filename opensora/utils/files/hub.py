"""Repositories of files on a Hugging Face hub (``HF_ENDPOINT``, else huggingface.co): their lists, and files in parts.

The parts of a file are asked for several at a time and written in order, so that whatever stops a download, what lies
on the disk is the beginning of the file, and the next one goes on behind it; huggingface_hub's own functions begin a
file again. Errors of the network go through as the library raises them, after it has tried again for half a minute.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from opensora.utils.files.published_files import PublishedFile

PART = 1 << 22  # bytes asked for at once; what is in flight is waited for when a download is stopped
WORKERS = 8
TIMEOUT_S = 30.0


def commit_of(name: str, revision: str | None = None) -> str:
    """The commit that a repository's branch, tag or shortened commit is at; None: its main branch."""
    from huggingface_hub import HfApi

    return str(HfApi().model_info(name, revision=revision).sha)


def list_files(name: str, commit: str, patterns: Sequence[str]) -> dict[str, PublishedFile]:
    """The files of a commit whose paths fit a pattern, in order, with what the hub says of their content."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.utils import filter_repo_objects

    tree = HfApi().list_repo_tree(name, recursive=True, revision=commit)
    files = {one.path: one for one in tree if isinstance(one, RepoFile)}
    known = {}
    for path in sorted(filter_repo_objects(files, allow_patterns=list(patterns))):  # two downloads meet at one file
        large = files[path].lfs
        known[path] = PublishedFile(
            size=files[path].size,
            sha256=large.sha256 if large else None,
            git_blob=None if large else files[path].blob_id,
        )
    return known


def append_rest(name: str, commit: str, file: str, size: int, part: Path) -> None:
    """Fetch what a partly fetched file lacks.

    Args:
        size: of the whole file.
        part: holds the beginning of the file, or is not there yet; holds all of it at the end.

    Raises:
        OSError: the disk, or a server that sends no parts.
        Exception: of the library, for what the network and the hub say.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import tqdm

    url = hf_hub_url(name, file, revision=commit)
    with part.open("ab") as out:
        there = out.tell()
        if there < size and size > PART:
            _require_parts(url)
        with tqdm(total=size, initial=there, unit="B", unit_scale=True, desc=Path(file).name, leave=False) as bar:
            for content in _parts(url, there, size):
                out.write(content)
                bar.update(len(content))


def _parts(url: str, begin: int, end: int) -> Iterator[bytes]:
    """The bytes from ``begin`` to ``end`` in order, some parts ahead of the one that is taken."""
    ahead: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for start in range(begin, end, PART):
            ahead.append(pool.submit(_part, url, start, min(start + PART, end)))
            if len(ahead) == WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _part(url: str, begin: int, end: int) -> bytes:
    from huggingface_hub.utils import hf_raise_for_status, http_backoff

    headers = _headers(begin, end)
    answer = http_backoff("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S)
    hf_raise_for_status(answer)
    content = bytes(answer.content)
    if answer.status_code != 206:  # of a small file a server may send all
        content = content[begin:end]
    if len(content) != end - begin:
        raise OSError(f"{len(content)} bytes came in place of {end - begin}")
    return content


def _require_parts(url: str) -> None:
    """That a server sends parts of files: one that sends gigabytes for each part would fill the memory."""
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    headers = _headers(0, 1)
    with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as answer:
        hf_raise_for_status(answer)
        status = answer.status_code
    if status != 206:
        raise OSError("its server sends files only as a whole")


def _headers(begin: int, end: int) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    # Identity: bytes are counted as they are in the file.
    return build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
