"""The report of a run: what became of every video and clip, and why."""
