"""Ray: places trainer ranks and engines, and lets the controller call them."""
