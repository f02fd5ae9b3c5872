"""The service: jobs over HTTP, a queue that survives, and groups of processes that sample them."""
