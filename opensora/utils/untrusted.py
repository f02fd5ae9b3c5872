"""The boundary around parsers of other people's bytes, for everything above acceleration: see acceleration/untrusted.py,
where it is because checkpoints are read there."""

from acceleration.untrusted import OUR_PACKAGES, is_our_mistake, parse_json, parsing, short_reason

__all__ = ["OUR_PACKAGES", "is_our_mistake", "parse_json", "parsing", "short_reason"]
