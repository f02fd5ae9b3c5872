"""References of a request: other people's bytes to files of the store, a picture as RGB PNG, a clip as the MP4 it is.

Pixels are decoded as the sampling command reads such files, in a process of its own that has a time limit and a memory
limit: what harms a decoder harms nothing else, and no pixel differs from the command's. The PNG holds pixels alone: as
EXIF turns them, of the first frame, and white where it is transparent. The client's name of a file is never read.
"""

import base64
import binascii
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from opensora.datasets.decode.common import DecodeError
from opensora.datasets.decode.file_type import sniff
from opensora.datasets.decode.process import DecoderProcess
from opensora.serve.refusal import Refused
from opensora.serve.request import Kind
from opensora.serve.store import Store
from opensora.utils.files.untrusted import parsing
from opensora.utils.files.video_writer import write_image

FIELD = "input_reference"
DECODE_S = 20.0  # of one file
WAIT_S = 60.0  # for those of others
MAX_FRAMES = 100_000  # of a clip
_DATA_URL = re.compile(r"data:(?:image/(?:png|jpe?g|webp)|video/mp4);base64,", re.IGNORECASE)
_PICTURES = ("PNG", "animated PNG", "JPEG", "WebP", "animated WebP")
_FORMATS = ("PNG", "JPEG", "WEBP")
_CLIP = "MP4 or QuickTime"
_TAKEN = "PNG, JPEG, WebP, or MP4 for kinds that take a clip"


def kind_of(data: bytes) -> Kind:
    """By the first bytes; whether it can be read is seen when it is."""
    return "clip" if data[4:8] == b"ftyp" else "image"


def of_json(value: Any) -> list[bytes]:
    """The files of ``input_reference`` in JSON: {image_url: "data:image/png;base64,..."}, or a list of such.

    Raises:
        Refused: 422 for what this service does not fetch or keep, 400 for what cannot be read.
    """
    if value is None:
        return []
    return [_of_object(item) for item in (value if isinstance(value, list) else [value])]


def _of_object(value: Any) -> bytes:
    if isinstance(value, Mapping) and set(value) == {"file_id"}:
        raise _refused(422, "file_id: this service keeps no files; send the file itself, or image_url as a data: URL")
    url = value.get("image_url") if isinstance(value, Mapping) and set(value) == {"image_url"} else value
    if isinstance(url, Mapping) and set(url) == {"url"}:
        url = url["url"]
    if not isinstance(url, str):
        raise _refused(400, 'must be a file, or {"image_url": "data:image/png;base64,..."}')
    found = _DATA_URL.match(url[:64])
    if not found:
        raise _refused(422, "image_url: must be a data: URL in base64 of PNG, JPEG, WebP or MP4; nothing is fetched")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused(400, "image_url: is no base64") from None


class Pictures:
    """Decodes one file at a time; thread-safe."""

    def __init__(self, store: Store, most_pixels: int) -> None:
        self._store, self._most_pixels = store, most_pixels
        self._turn = threading.Lock()
        self._decoder: DecoderProcess | None = None

    def keep(self, id: str, number: int, data: bytes) -> str:
        """The name in the store of a file that a job's request came with.

        Raises:
            Refused: 422, it cannot be read or is too large; 503, others take too long.
            OSError: of the disk.
        """
        if not self._turn.acquire(timeout=WAIT_S):
            raise Refused(503, "many pictures are being read; try again", code="busy", headers={"Retry-After": "5"})
        try:
            aside = self._store.reference(f"{id}-{number}.mp4").with_suffix(".part")
            try:
                aside.write_bytes(data)
                return self._kept(aside, id, number)
            finally:
                aside.unlink(missing_ok=True)
        finally:
            self._turn.release()

    def _kept(self, aside: Path, id: str, number: int) -> str:
        found = sniff(str(aside))
        try:
            if found.what in _PICTURES:
                name = f"{id}-{number}.png"
                self._picture(aside, self._store.reference(name))
            elif found.what == _CLIP:
                name = f"{id}-{number}.mp4"
                self._check_clip(aside)
                aside.rename(self._store.reference(name))
            else:
                raise _refused(422, f"{found.what}; must be {_TAKEN}")
        except DecodeError as error:
            raise _refused(422, f"{error.cause}; must be {_TAKEN}, whole") from None
        return name

    def _picture(self, aside: Path, target: Path) -> None:
        with (
            parsing(lambda reason: _refused(422, f"{reason}; must be {_TAKEN}")),
            Image.open(aside, formats=_FORMATS) as image,
        ):
            width, height = image.size
        self._check_pixels(width, height)
        if self._decoder is None:
            self._decoder = DecoderProcess()
        frames = self._decoder(
            str(aside), 0, 1, resize=None, threads=1, decoder="pyav", timeout_s=DECODE_S
        )  # (1, H, W, 3)
        self._check_pixels(frames.shape[2], frames.shape[1])
        write_image(target, frames[0])

    def _check_clip(self, aside: Path) -> None:
        if self._decoder is None:
            self._decoder = DecoderProcess()
        facts = self._decoder.probe(str(aside), timeout_s=DECODE_S)
        self._check_pixels(facts.width, facts.height)
        if facts.num_frames > MAX_FRAMES:
            raise _refused(422, f"{facts.num_frames} frames; must be at most {MAX_FRAMES}")

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._most_pixels:
            raise _refused(422, f"{width}x{height} pixels; must be at most {self._most_pixels} in all")

    def copy(self, name: str, id: str, number: int) -> str:
        """A reference of one job for another.

        Raises:
            Refused: 409, it is gone.
        """
        source = self._store.reference(name)
        copied = f"{id}-{number}{source.suffix}"
        try:
            self._store.reference(copied).write_bytes(source.read_bytes())
        except FileNotFoundError:
            raise Refused(409, "a reference of this video is gone", code="reference_gone") from None
        return copied

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()


def _refused(status: int, message: str) -> Refused:
    return Refused(status, f"{FIELD}: {message}", param=FIELD, code="invalid_reference")
