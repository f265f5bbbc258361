"""`megatron-vespo view`: a local web page over runs, also while they go on.

It reads the files of OUTPUT_DIR, and needs neither torch nor Ray nor SGLang.
"""
