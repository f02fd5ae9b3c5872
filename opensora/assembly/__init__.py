"""Where models meet acceleration, once for training, sampling and encoding ahead."""
