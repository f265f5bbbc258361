"""Names that SGLang imports from here; none is called by the models served on CPU."""

from sgl_kernel import __getattr__  # noqa: F401
