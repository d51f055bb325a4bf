"""Adapters to other frameworks. Each imports its framework when it is used, not before."""
