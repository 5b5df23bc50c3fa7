"""Weights and configurations of other libraries in, ours out: every tensor accounted for, or a refusal that names it."""
