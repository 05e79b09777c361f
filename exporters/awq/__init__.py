"""AWQ: channels scaled by what goes through them before they are rounded, and its format."""
