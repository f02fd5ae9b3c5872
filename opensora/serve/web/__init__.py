"""The web process: API, page, metrics. It imports no torch; what it asks of the GPU goes through the queue."""
