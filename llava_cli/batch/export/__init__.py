"""`llava export`: the rows of a batch for other programs."""
