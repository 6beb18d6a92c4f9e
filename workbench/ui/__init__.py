"""The two front ends: JupyterLab (ipywidgets) and a served page (Panel), built from one session."""
