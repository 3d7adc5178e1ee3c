"""ncf-dist: a nightly line from raw interaction logs to published top-K recommendations."""

import os

__version__ = "0.1.0"

# In MKL's own default mode, small products on AMD processors round by where their rows stand, and MKL reads the mode at
# a process's first product. So it is set here, before any module of ours imports torch, for drivers, Spark's workers,
# ranks, notebooks and nodes started by hand. A value of the user's own stays. `products.check` proves that it works.
os.environ.setdefault("MKL_CBWR", "AVX2")
