"""The public data sets that are had by name, and the source that each of them comes from."""

PUBLIC = {"ml-1m": "movielens", "beauty": "amazon", "clothing": "amazon", "sports": "amazon", "toys": "amazon"}


def names_of(source: str) -> list[str]:
    """Return the names of the data sets that a source has; none for "folder" and "planted"."""
    return [name for name, its_source in PUBLIC.items() if its_source == source]
