"""Scorers: reward functions and reward models."""
