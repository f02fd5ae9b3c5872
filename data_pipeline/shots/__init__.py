"""From scores and thumbnails of frames to the transitions of a video, without a decode."""
