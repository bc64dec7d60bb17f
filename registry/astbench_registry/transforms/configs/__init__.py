"""Options of the transforms, one file each; no torch."""
