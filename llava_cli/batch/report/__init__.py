"""`llava report`: the rows of a batch as one page."""
