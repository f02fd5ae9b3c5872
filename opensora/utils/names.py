"""Names of files and folders that are made from what a user writes: runs, samples."""

import re
import unicodedata

MAX_BYTES = 255  # of a name, on every common file system
# Devices on Windows, whatever follows the dot.
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])( *\..*)?", re.IGNORECASE)
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
# Marks that have a name shown in another order than it is written in.
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_MARKS = "\u200e\u200f\u061c"


def name_problem(name: str, suffix: str = "", most: int = MAX_BYTES) -> str | None:
    """Why no file or folder can be called so; None for a name that every common file system takes and shows as it is.

    Args:
        suffix: what follows the name, with its dot; empty: nothing.
        most: bytes in UTF-8 of the name with its suffix.
    """
    if not name:
        return "must not be empty"
    if set(name) & set("/\\"):
        return f"must be a {'file ' if suffix else ''}name, not a path"
    if any(unicodedata.category(character) in _CONTROLS for character in name):
        return "must hold no control characters; remove them"
    if any(character in _MARKS or unicodedata.bidirectional(character) in _DIRECTIONS for character in name):
        return "must hold no marks that change the direction of writing; remove them"
    if name != name.strip():
        return "must not begin or end with a space; remove it"
    if name.startswith("."):
        return "must not begin with a dot: it would be hidden; remove it"
    if name.startswith("-"):
        return "must not begin with a dash: commands take it for an option; remove it"
    if f"{name}{suffix}".endswith("."):
        return "must not end with a dot: Windows drops it; remove it"
    if _RESERVED.fullmatch(f"{name}{suffix}"):
        return "is the name of a device on Windows; choose another one"
    size, longest = len(name.encode()), most - len(suffix.encode())
    if size > longest:
        return f"has {size} bytes in UTF-8, must be at most {longest}{' and its suffix' * bool(suffix)}; shorten it"
    return None
