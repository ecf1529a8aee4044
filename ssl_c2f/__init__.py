"""Coarse-to-fine self-supervised pretraining of audio spectrogram transformers."""

__version__ = "0.1.0"
