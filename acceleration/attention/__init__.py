"""Attention of this process's queries: from parts, by log-sum-exp, and the kernels that compute a part."""
