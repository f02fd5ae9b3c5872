"""What the model is told beside noise and time."""
