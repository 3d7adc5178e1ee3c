"""The job clean: the lake keeps what `retention` says and what anything still needs, and no more."""
