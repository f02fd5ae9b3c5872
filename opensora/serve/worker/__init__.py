"""A group of processes that samples: rank 0 talks to the queue, all act on what it says."""
