"""Pictures, from where a user names them to an RGB image.

`reader.py` and `fetch.py` get the bytes, `sandbox.py` has `decode.py` decode them in a process without rights.
`formats.py` recognizes file formats; `unsupported.py` says what to do with those that we do not open.
"""
