"""Ray: where trainer ranks and engines run, and how the controller talks to them."""
