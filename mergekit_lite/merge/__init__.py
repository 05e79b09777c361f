"""How a recipe becomes files: plan, stream, writer."""
