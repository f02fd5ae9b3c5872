"""The caption that a person has written for a video: in a captions file, or in a text or JSON file beside it."""

import os
from functools import lru_cache
from pathlib import Path

from data_pipeline.captions import Caption, CaptionsFile, Texts, caption_of, find_captions, judged, read_captions
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parse_json
from opensora.utils.files.user_files import absence, read_text

_JSON_NAMES = ("text", "caption", "prompt", "description")  # the first one that holds a text


def captions_files(named: str, source: object) -> tuple[str, ...]:
    """The captions files of a run: the one that is named, else ``captions.csv`` of each folder with videos, or above.

    Raises:
        UserError: the one that is named is not there.
    """
    if named:
        if reason := absence(named, "captions file"):
            raise UserError(f"captions.file={named}: {reason}")
        return (os.path.abspath(named),)
    folders = [source] if isinstance(source, str) else list(source) if isinstance(source, (list, tuple)) else []
    found = (find_captions(Path(folder)) for folder in folders if os.path.isdir(folder))
    return tuple(dict.fromkeys(os.path.abspath(path) for path in found if path is not None))


def caption_beside(file: str, files: tuple[str, ...]) -> Caption:
    """The first caption there is: of a captions file, of a text beside the video, of a JSON file beside it.

    Raises:
        UserError: a captions file cannot be read.
    """
    video = Path(file)
    texts = Texts(path for path in (video.with_suffix(".txt"), Path(f"{file}.txt")) if path.is_file())
    faults: list[Caption] = []
    known_files: list[CaptionsFile | None] = [_captions(path, os.stat(path).st_mtime_ns) for path in files]
    for known in known_files or [None]:
        found = caption_of(video, known, texts)
        if not found.reason:
            return found
        faults.append(found)
    for path in (video.with_suffix(".json"), Path(f"{file}.json")):
        if path.is_file():
            found = _of_json(path)
            if not found.reason:
                return found
            faults.append(found)
    return min(faults, key=lambda fault: fault.reason == "no caption")


@lru_cache(maxsize=16)
def _captions(path: str, changed_ns: int) -> CaptionsFile:
    """The last argument makes a file that was written anew another one."""
    return read_captions(Path(path))


def _of_json(path: Path) -> Caption:
    def refuse(reason: str) -> UserError:
        return UserError(f"{path.name}: {reason}")

    try:
        content = parse_json(read_text(path, path.name).encode(), refuse)
    except UserError as error:
        return Caption(reason="caption cannot be read", detail=str(error))
    values = [content.get(name) for name in _JSON_NAMES] if isinstance(content, dict) else [content]
    text = next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")
    return judged(text, path.name)
