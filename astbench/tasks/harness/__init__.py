"""Tasks of EleutherAI's lm-eval, RULER and LongBench among them, asked of a model with a swapped attention."""
