"""Messages of PyTorch and other libraries, shortened to one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may go on for pages; the name of its type if none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, without the advice that follows; the name of its type if none."""
    return " ".join(str(error).strip().partition("\n\n")[0].split()).partition(". ")[0] or type(error).__name__
