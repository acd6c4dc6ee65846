"""What `llava batch` is about: SOURCEs of any kind, and the tasks in them."""
