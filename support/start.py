"""Going away: see support/__init__.py."""
