"""What was laid over a picture after it was filmed: text that can be read, marks that never move."""
