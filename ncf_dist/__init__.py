"""ncf-dist: a nightly line from raw interaction logs to published top-K recommendations."""

import os

__version__ = "0.1.0"


def _mode() -> str:
    """MKL's mode for this processor. On Intel's the branch AVX2 rounds small layers by row unless it is strict, which
    costs half the speed of AVX-512; other makers' have one branch, whatever is named here."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        flags = ""
    return "AUTO" if "avx512f" in flags.split() else "AVX2,STRICT"


# In MKL's own default mode, small products on AMD processors round by where their rows stand, and MKL reads the mode at
# a process's first product. So it is set here, before any module of ours imports torch, for drivers, Spark's workers,
# ranks, notebooks and nodes started by hand. A value of the user's own stays. `products.check` proves that it works.
os.environ.setdefault("MKL_CBWR", _mode())
