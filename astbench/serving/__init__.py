"""A trained model behind HTTP: loaded, batched, guarded, watched. The command is `astbench serve`."""
