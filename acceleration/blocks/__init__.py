"""What is done to every transformer block: gradient checkpointing, offload of activations, compilation."""
