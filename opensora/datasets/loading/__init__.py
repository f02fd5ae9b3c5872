"""From the plan to batches in memory: decoded clips, or features that were stored."""
