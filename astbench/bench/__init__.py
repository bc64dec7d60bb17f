"""What attention costs: time and memory of whole layers, measured a process a cell."""
