"""Settings: one get_config() a file."""
