"""Damaged and foreign input: every reader reports it in one line."""
