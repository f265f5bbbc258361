"""Policy losses, one module a method; `table.py` names them."""
