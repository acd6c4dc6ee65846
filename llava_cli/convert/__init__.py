"""`llava models convert`: turns a folder of LLaVA's original code into a checkpoint in transformers' format.

    tensors.py       reads tensors by their original names, one at a time
    lora.py          merges a LoRA of the original training code into its base
    rename.py        original tensor names -> transformers' names
    configs.py       the original config -> transformers' configs of tower, decoder and the whole
    processor.py     the processor's config files
    tokenizer.py     the tokenizer, with tokens for pictures
    locate.py        folders of models on this machine
    conversion.py    puts everything together
    output.py        writes the new folder, completely or not at all

Nothing in the folder is run: pickles are read by torch with `weights_only`, and no tokenizer or template is used.
"""
