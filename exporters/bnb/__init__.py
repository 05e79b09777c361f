"""NF4, as bitsandbytes stores it."""
