"""Training objectives: from clean latents to a noisy input, a time and a target."""
