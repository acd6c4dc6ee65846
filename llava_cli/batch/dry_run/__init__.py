"""`llava batch --dry-run`: what a run would do, and what it would take."""
