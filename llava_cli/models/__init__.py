"""Checkpoints: found, downloaded, validated, and their weights loaded."""
