"""Commands: parse, load, call."""
