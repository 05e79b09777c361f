"""What is shipped: bundles of what pack makes, ready to be used elsewhere."""
