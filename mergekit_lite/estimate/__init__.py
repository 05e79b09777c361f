"""How long a merge takes, from what this machine was measured to do."""
