"""What an error of PyTorch or another library says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Of its message, which for many of PyTorch's goes on for pages; its type without one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_sentence(error: Exception) -> str:
    """Of its message, without the advice that follows; its type without one."""
    return " ".join(str(error).strip().partition("\n\n")[0].split()).partition(". ")[0] or type(error).__name__
