"""How far to trust the probabilities of a model that chooses."""
