"""Pictures of figures: on screen by Plotly, on paper by matplotlib, from the same data, levels and limits."""
