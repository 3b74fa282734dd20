"""Surfaces of low loss in weight space: curves and simplexes between networks, planes and rays through them."""
