"""The policy on Megatron-Core. Importing this package first loads the machine's runtime plugins."""

from megatron_vespo.system.plugins import prepare_for_megatron

prepare_for_megatron()
