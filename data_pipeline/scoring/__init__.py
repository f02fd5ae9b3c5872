"""Models that score clips: from local files, and only where a configuration names them."""
