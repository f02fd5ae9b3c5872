"""One file per stage; ``data_pipeline.stage_list`` has their order."""
