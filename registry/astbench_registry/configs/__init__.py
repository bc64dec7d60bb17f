"""Options and abilities of the built-in variants, a file each. Nothing here imports torch."""
