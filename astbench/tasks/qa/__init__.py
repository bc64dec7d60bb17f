"""Extractive question answering over long documents: TriviaQA and SQuAD."""
