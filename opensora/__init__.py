"""Training and sampling of video diffusion transformers; see docs/ for the map."""
