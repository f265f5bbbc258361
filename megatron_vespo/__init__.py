"""VESPO reinforcement learning on Megatron-Core, SGLang and Ray."""

__version__ = "0.2.0"
