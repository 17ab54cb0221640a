"""dualray: train DeepSeek-V3-style models on Ray, serve them from the same actors."""

__version__ = "0.1.0"
