"""Figures drawn: Plotly on screen, matplotlib on paper. Nothing below imports this package."""
