"""llama.cpp's own server: `llama_server.py MODEL MMPROJ [KEY]` prints "ready URL" once it listens."""

from __future__ import annotations

import sys
import threading

import xllamacpp  # type: ignore[import-untyped]

SLOTS = 2

params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = sys.argv[1:3]
params.api_keys = sys.argv[3:]
params.model_alias = {"llava-gguf"}
params.hostnames, params.port = ["127.0.0.1"], 0
params.n_parallel, params.n_ctx = SLOTS, SLOTS * 1024  # shared by the slots
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more would spin while they wait for each other
server = xllamacpp.Server(params)
sys.stdout.write(f"ready {server.listening_address}\n")  # in one write: the server's threads log to the same stream
sys.stdout.flush()
threading.Event().wait()
