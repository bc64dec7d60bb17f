"""One file a variant: its equations, where it differs from its paper, its code."""
