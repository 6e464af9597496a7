"""Shared by all: errors, the command line, messages, paths."""
