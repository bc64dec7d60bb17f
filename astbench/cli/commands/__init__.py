"""One module per command of `astbench`."""
