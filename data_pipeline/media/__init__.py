"""Videos by PyAV: what the container says, every frame once at a small size, and clips written anew."""
