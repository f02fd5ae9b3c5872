"""Buckets of one resolution, length and aspect ratio: which one a clip goes to, and what it costs."""
