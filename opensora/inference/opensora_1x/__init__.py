"""Sampling as the commands of Open-Sora 1.0 to 1.3 do it: prompts with JSON, scores and parts for each clip, references
that stand in a clip, clips that go on from one another."""
