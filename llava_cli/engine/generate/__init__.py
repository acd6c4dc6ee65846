"""The one way from a prompt to text."""
