"""Examination of a cluster before a long run; `launch/doctor.py` is its command line."""
