"""Affine subspaces of weight space: built from what training leaves behind, and sampled in a few coordinates."""
