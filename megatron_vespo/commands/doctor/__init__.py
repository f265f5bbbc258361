"""`megatron-vespo doctor`: whether a machine, or all nodes of a SLURM step, can run this program.

Nothing here imports torch or any package that is checked: what may be broken runs in processes of its own.
"""
