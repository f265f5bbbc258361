"""`megatron-vespo doctor`: checks whether a machine, or all nodes of a SLURM step, can run this program.

Nothing here imports torch or a package that is checked: what may be broken runs in its own process.
"""
