"""What a run would need before it starts: memory, bytes, FLOPs and time of every layout."""
