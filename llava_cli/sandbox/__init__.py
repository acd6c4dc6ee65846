"""Where strangers' bytes are decoded: processes that can read what they are given, answer, and nothing else.

`process.py` starts one and talks to it, `worker.py` is what runs in it, `confine.py` takes its rights away. What they
do is a job: `images/sandbox.py` decodes pictures, `prompts/sandbox.py` runs a checkpoint's chat template and tokenizer.
A job has both sides of its protocol in one file: `prepare()` and `answer(request)` run inside, what is called from
outside is above.
"""
