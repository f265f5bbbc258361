"""A run of the controller in virtual time: the real buffer decides, only what takes time is modelled."""
