"""megatron-vespo on a machine without CUDA and without patches/cpu: a cluster's head node, a laptop."""

import sys

from megatron_vespo.system import plugins as runtime

runtime.load_runtime_plugins = lambda: None

if __name__ == "__main__":
    from megatron_vespo.commands import main as cli

    sys.exit(cli.run(sys.argv[1:]))
