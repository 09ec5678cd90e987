"""Logs of any trainer."""
