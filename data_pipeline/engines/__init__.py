"""Who calls ``run_shard``: processes of this machine, or tasks of a cluster."""
