"""A critic that is a small head on features which are there anyway."""
