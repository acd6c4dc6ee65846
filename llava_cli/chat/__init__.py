"""A conversation at the keyboard: `session` holds it, `store` keeps it, `repl` reads and `commands` obeys."""
