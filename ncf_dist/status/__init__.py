"""The job status: what became of the last nights, as a table, as JSON and as a page."""
