"""What a clip is like, from the columns of the one decode: bars, freezes, what the camera does."""
