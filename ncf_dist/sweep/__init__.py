"""The job sweep: a search over settings, each trial an experiment of its own."""
