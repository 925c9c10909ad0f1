"""The end of a training: save, merge, push; and figures on the way."""
