"""The clip table: its rows, their index on disk, and where the bytes of a clip are."""
