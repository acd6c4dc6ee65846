"""Processes that decode strangers' bytes: they can read what they are sent, reply, and do nothing else.

`process.py` starts them and talks to them, `worker.py` runs in them, `confine.py` takes their rights away, and
`supervisor.py` kills those that are late. Their work is a job: `images/sandbox.py` decodes pictures,
`prompts/sandbox.py` runs a checkpoint's chat template and tokenizer. A job has both sides of its protocol in one file:
`prepare()` and `answer(request)` run inside, the functions above them outside.
"""
