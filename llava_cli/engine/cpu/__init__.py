"""What a CPU computes faster than transformers does; `patch` is the only door."""
