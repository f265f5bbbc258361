"""Model families: parameter names, shapes, mappings and HF configs."""
