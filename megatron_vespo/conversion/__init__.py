"""HF <-> Megatron: one declarative table a model family serves loading, export and online weight sync."""
