"""What became of runs, on one page."""
