"""A run on a Ray cluster: workers answer ranges of its rows. Only `cluster.py` and `worker.py` import Ray."""
