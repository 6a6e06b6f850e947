"""Going away: see support/ranks.py."""
from support.ranks import *  # noqa: F403
