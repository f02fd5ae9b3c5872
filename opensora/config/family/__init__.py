"""Configurations of the Open-Sora family, 1.0 to 1.3 and 2, as ours: a table of keys, and what several say together.

``read_family`` reads a file; ``flag_overrides`` are the family's flags beside a configuration of ours.
"""

from opensora.config.family.flags import flag_overrides, read_family, trains

__all__ = ["flag_overrides", "read_family", "trains"]
