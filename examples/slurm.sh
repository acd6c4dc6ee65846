#!/bin/bash
# Eight shards as an array job, on a file system that all nodes share: sbatch examples/slurm.sh
# The shard that ends last joins the rows. A job that was ended is queued again, and goes on where it was.
#SBATCH --job-name=llava
#SBATCH --array=1-8
#SBATCH --requeue
#SBATCH --signal=TERM@120  # what was begun is finished and kept
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8

SOURCE=${SOURCE:-photos/}
QUESTION=${QUESTION:-describe the photo}
OUTPUT=${OUTPUT:-out.jsonl}

exec llava batch "$SOURCE" "$QUESTION" -o "$OUTPUT" --shard "$SLURM_ARRAY_TASK_ID/8"
