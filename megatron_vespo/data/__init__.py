"""Prompts in, packed micro-batches out: prompt files and their order, sequence packing, flat batch fields."""
