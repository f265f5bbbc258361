"""The policy on Megatron-Core. Importing anything here loads the machine's runtime plugins first."""

from megatron_vespo.runtime import load_runtime_plugins

load_runtime_plugins()
