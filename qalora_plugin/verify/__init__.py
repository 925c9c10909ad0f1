"""Prove that a merged model or an export is what it must be."""
