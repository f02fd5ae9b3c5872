"""What a run keeps on disk: its lock, resuming, exports."""
