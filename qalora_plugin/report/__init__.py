"""The report of a run: one HTML page to look at, and its figures as JSON."""
