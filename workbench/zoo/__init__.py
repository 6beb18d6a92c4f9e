"""Small models and tasks that notebooks, experiments and tests share."""
