"""Time limits for work that every process does on this machine."""

from __future__ import annotations

# For a Python process that imports torch, Megatron or SGLang from a shared disk with a cold cache.
IMPORT_TIMEOUT_S = 600.0
