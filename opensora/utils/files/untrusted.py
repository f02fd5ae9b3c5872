"""The boundary around other people's bytes, for all that is above acceleration: at home in
acceleration/files, as checkpoints need it too."""

from acceleration.files.atomic_write import read_small, require_file
from acceleration.files.sealed_json import (
    ANY,
    COUNT,
    NUMBER,
    OBJECT,
    SHA256,
    TEXT,
    WHOLE,
    Each,
    Kind,
    Shape,
    mismatch,
    seal,
    unseal,
)
from acceleration.files.untrusted import OUR_PACKAGES, is_our_mistake, parse_json, parsing, short, short_reason

__all__ = [
    "OUR_PACKAGES",
    "is_our_mistake",
    "parse_json",
    "parsing",
    "short",
    "short_reason",
    "read_small",
    "require_file",
    "ANY",
    "COUNT",
    "NUMBER",
    "OBJECT",
    "SHA256",
    "TEXT",
    "WHOLE",
    "Each",
    "Kind",
    "Shape",
    "mismatch",
    "seal",
    "unseal",
]
