"""Plans a recipe from tensor shapes only: memory by part, bytes sent, and what fits on a machine."""
