"""What a GPU does faster than transformers would: one token of each row as a captured CUDA graph.

`decode_graphs.DecodeGraphs` is the way in; `static_cache` has the KV cache that stays in its place.
"""
