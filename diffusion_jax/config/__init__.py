"""The config of a run: its fields and defaults, loading, overriding, comparing with a record."""
