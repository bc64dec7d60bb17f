"""A server under load that comes at random times, and what its clients see. The command is `astbench loadtest`."""
