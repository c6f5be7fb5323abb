"""The libraries of the integrations are optional."""

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("accelerate") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # First of all, because of what it sets for transformers.
    import tests.support.language_models  # noqa: F401
