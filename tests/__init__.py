"""Tests of stagdist; they mirror the package."""
