"""Pictures: read from where a user names them, decoded in the sandbox."""
