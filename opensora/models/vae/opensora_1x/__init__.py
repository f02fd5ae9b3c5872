"""Autoencoders of Open-Sora 1.0 to 1.3: the image autoencoder of Stable Diffusion, and two for clips."""
