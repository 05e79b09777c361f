"""Licences of models: what they ask, what fits together, what a release may be under."""
