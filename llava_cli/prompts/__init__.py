"""Conversations -> the tensors that a model reads.

`prompter.py` renders with a template (`chat_template.py`, `templates/`) and encodes with the checkpoint's processor
(`processor.py`, `pixtral.py`); `loading.py` makes one of a checkpoint. Templates and tokenizers of checkpoints run in
`sandbox.py` first.
"""
