#!/bin/bash
# Shards over SSH with GNU parallel, one at a time on each host; all hosts see this folder.
#   HOSTS=gpu1,gpu2,gpu3 examples/parallel.sh photos/ "describe the photo" -o out.jsonl
# A host that fails loses nothing: its shard is begun again elsewhere.
set -euo pipefail

HOSTS=${HOSTS:-:}  # `:` is this machine
SHARDS=${SHARDS:-16}

parallel --sshlogin "$HOSTS" --jobs 1 --workdir "$PWD" --retries 3 --line-buffer \
  llava batch "$(printf '%q ' "$@")" --shard "{}/$SHARDS" ::: $(seq "$SHARDS")
