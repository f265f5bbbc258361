"""How long this machine may take for what every process does."""

from __future__ import annotations

# A Python process that imports torch, Megatron or SGLang from a shared disk which has not been read lately.
IMPORT_TIMEOUT_S = 600.0
