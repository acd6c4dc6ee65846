"""Pictures, from where a user names them to an RGB image.

`reader.py` and `fetch.py` get the bytes, `sandbox.py` has them decoded in a process without rights, where `job.py`
calls `decode.py` for pictures and `pdf.py` for pages.
`formats.py` recognizes file formats; `unsupported.py` says what to do with those that we do not open.
"""
