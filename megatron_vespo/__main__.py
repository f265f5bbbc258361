"""`python -m megatron_vespo COMMAND ...`, the same as `megatron-vespo COMMAND ...`."""

from megatron_vespo.commands.main import main

if __name__ == "__main__":
    main()
