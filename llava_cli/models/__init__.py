"""Checkpoints: finding, downloading, checking and loading them.

aliases.py, families.py                      data: short names of models, and what each family was trained with
registry.py, adapters.py                     a name -> the checkpoint, and its adapter, on this machine
hub.py, download.py                          the Hugging Face Hub
checkpoint_files.py, validate.py             a checkpoint's config files, checked before a weight is read
untrusted_config.py                          what a config must not make transformers do
incomplete.py, other_formats.py,
original_format.py                           errors that say what a folder is instead of a checkpoint
weight_files.py, pickled_tensors.py          files of tensors
fingerprint.py, digests.py                   what identifies a checkpoint
geometry.py, footprint.py, precision.py      a model's sizes, the memory that it takes, and the precision that fits
weights.py, quantized_cache.py,
stored_quantization.py, quiet.py             loading and quantizing weights
adapter_config.py, adapter_merge.py          merging a PEFT adapter into them
"""
