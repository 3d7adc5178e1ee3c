"""ncf-dist: a nightly line from raw interaction logs to published top-K recommendations."""

__version__ = "0.1.0"
