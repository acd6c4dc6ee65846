"""Where strangers' bytes are decoded: processes that can read what they are given, answer, and nothing else.

`process.py` starts one and talks to it, `worker.py` is what runs in it, `confine.py` takes its rights away. What they
do is a job: `pictures.py` decodes pictures, `text.py` runs a checkpoint's chat template and tokenizer. A job has both
sides of its protocol in one file: `prepare()` and `answer(request)` run inside, what is called from outside is above.
"""
