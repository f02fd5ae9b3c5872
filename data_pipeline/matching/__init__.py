"""Which clips show the same footage: candidates by hashes, confirmed on thumbnails, in groups."""
