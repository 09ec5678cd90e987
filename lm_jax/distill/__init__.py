"""Distillation: a student trained from teachers as well as from the text."""
