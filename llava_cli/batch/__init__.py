"""`llava batch`: `source` yields tasks, `picture_loader` opens their pictures, `runner` asks the engine and makes rows,
`journal` writes them so that a run can be resumed. Start at `run.run`.
"""
