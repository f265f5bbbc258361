"""The policy on Megatron-Core. Importing anything here loads the machine's runtime plugins first."""

from megatron_vespo.system.plugins import prepare_for_megatron

prepare_for_megatron()
