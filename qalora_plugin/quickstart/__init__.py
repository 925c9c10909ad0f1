"""The embedded quickstart: a small base model and its instruction pairs."""
