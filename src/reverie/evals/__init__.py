"""Evaluators: given prediction functions and data, they return measured numbers; they never see a system."""
