"""Ranks: what they send each other, and how they make sure of being called alike."""
