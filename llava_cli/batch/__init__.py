"""A folder, list or file of questions to JSONL: `tasks` says what is asked, `journal` keeps it, `runner` does it."""
