"""Losses: plain functions of tensors and callables to a scalar. They own no parameter."""
