"""One file for every kind of result: from the runs of a group to its tables."""
