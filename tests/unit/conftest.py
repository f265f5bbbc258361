"""Settings of all unit tests."""

from hypothesis import settings

# no deadline: on a busy machine the first example pays for what torch loads; derandomised: a failure repeats
settings.register_profile("unit", deadline=None, derandomize=True)
settings.load_profile("unit")
