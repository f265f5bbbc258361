"""Losses, advantages and diagnostics as pure functions of tensors: no Megatron, no Ray, no flags."""
