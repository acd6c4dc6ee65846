"""Conversations -> the tensors that a model reads."""
