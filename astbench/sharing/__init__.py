"""A run's trained weights for others: a folder as Hugging Face's hub takes it, and its model card."""
