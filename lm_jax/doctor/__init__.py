"""Checks that find out why a language-model run went wrong, or will."""
