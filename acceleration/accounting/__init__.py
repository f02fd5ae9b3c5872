"""What a step needs, known before it runs: bytes that are sent, activations, peak memory."""
