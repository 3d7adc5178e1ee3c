"""The job runs: the runs and experiments of one night beside one another, the best first."""
