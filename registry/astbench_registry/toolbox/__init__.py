"""What several variants are made of."""
