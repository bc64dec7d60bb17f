"""Recall probes: multi-query associative recall and needles in a haystack."""
