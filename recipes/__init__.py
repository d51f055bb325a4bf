"""Runnable training recipes."""
