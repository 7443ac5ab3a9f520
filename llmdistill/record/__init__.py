"""What a run writes and shows: the run folder, meters, the run page."""
