"""From prompts to packed micro-batches: prompt files and their order, sequence packing, flat batch fields."""
