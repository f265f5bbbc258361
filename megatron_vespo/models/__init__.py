"""Model families: names, shapes, mappings, HF configuration."""
