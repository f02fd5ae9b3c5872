"""Where captions come from: files beside the videos, a model behind an endpoint, what was measured."""
