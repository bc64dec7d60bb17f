"""Language modelling: WikiText-103 and plain text."""
