"""Stages that are jobs of their own: each starts, fails and comes back without the others."""
