"""`llava chat`: `repl` reads lines, `commands` runs those that begin with a slash, `session` asks the others about the
conversation so far, `store` saves it.
"""
