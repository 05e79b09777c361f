"""What is in a model or an adapter, and what a fine-tune changed."""
