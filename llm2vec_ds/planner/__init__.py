"""What a recipe needs on a machine: memory by part, bytes on the wire, and what fits; from shapes alone."""
