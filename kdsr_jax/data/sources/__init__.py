"""Where logs, item metadata and features come from, one source a module."""
