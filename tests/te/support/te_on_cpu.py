"""Imported first by the server of ranks under TE: they find Transformer Engine, computing on the CPU."""

import on_cpu

from megatron_vespo.system.plugins import load_runtime_plugins

on_cpu.install()
load_runtime_plugins()
