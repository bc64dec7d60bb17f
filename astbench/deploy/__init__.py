"""Attentions served in turn under the same load: cells, records and curves. The command is `astbench deploy-test`."""
