"""What watches a run while it trains: numbers, reads, time."""
