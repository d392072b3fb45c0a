"""Pretraining of StagFormer language models on many nodes, and decoding with all sections at once."""

__version__ = "0.1.0"
