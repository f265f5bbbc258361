"""Access to the machine: HTTP, disk, signals, SLURM's variables, plug-ins, hardware."""
