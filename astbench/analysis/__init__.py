"""What an attention chose, beside what dense attention would have looked at. See docs/analysis.md."""
