"""The tree of settings: schema, loading, and the rules between settings."""
