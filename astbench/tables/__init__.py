"""Result tables made from records and nothing else: read, label, lay out, write, compare. Imports nothing heavy."""
