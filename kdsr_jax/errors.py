"""The one exception for everything a user can put right."""


class UserError(Exception):
    """Bad input; ``kdsr_jax.main`` prints it as one line and exits with code 2."""
