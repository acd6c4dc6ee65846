"""Engines whose model is in another process: the user's own server, or one that speaks OpenAI's API."""
