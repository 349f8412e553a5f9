"""The grids that experts are trained on, and how their values are made, kept and served."""
