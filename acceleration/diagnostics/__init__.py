"""What watches a job: hangs, copies that differ, memory, and the checks before the start."""
