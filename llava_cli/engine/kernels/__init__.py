"""Code for LLVM, which makes machine code of it for the CPU at hand: what there is no fast library for."""
