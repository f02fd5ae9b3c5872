"""Parallel plumbing: processes, meshes, sharding, sequence parallelism, checkpoints. Knows nothing about video."""
