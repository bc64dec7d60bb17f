"""Options of the policies, a file each. Imports nothing heavy."""
