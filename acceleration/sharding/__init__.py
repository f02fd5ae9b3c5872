"""Which part of every parameter this process holds, and in which precision: FSDP and tensor parallelism."""
