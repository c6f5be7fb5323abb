"""How far a teacher's distribution p is from the student's q: the four divergences of the logit loss. A leaf."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

# What a caller names; the last two with a parameter.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew")
_RANGES = {"jsd": "[0, 1]", "skew": "[0, 1)"}


class Divergence(NamedTuple):
    """A divergence as backends take it. `mixture_share`, that of p in M, is beta of "jsd" or alpha of "skew", inside
    (0, 1), else 0.

    forward_kl    KL(p || q)
    reverse_kl    KL(q || p)
    jsd, beta     beta KL(p || M) + (1 - beta) KL(q || M) with M = beta p + (1 - beta) q
    skew, alpha   KL(p || M) with M = alpha p + (1 - alpha) q

    Sources: Hinton et al. 2015; Gu et al., MiniLLM, 2024; Agarwal et al., GKD, 2024 (jsd); Ko et al., DistiLLM, 2024.
    """

    kind: str
    mixture_share: float = 0.0


FORWARD_KL = Divergence("forward_kl")
REVERSE_KL = Divergence("reverse_kl")


def as_divergence(value: Any) -> Divergence:
    """A caller's divergence: a name, ("jsd", beta) or ("skew", alpha).

    At the ends of its range a divergence is a simpler one: jsd with 0 and skew with 0 are the forward KL, jsd with 1 is
    the reverse KL (as generalised JSD is defined in TRL; the limits of the formula itself are 0).

    Raises:
        TypeError, ValueError: naming the value and what is allowed.
    """
    kind, parameter = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, 0.0)
    if not isinstance(kind, str) or kind not in DIVERGENCES:
        raise ValueError(
            f"divergence must be 'forward_kl', 'reverse_kl', ('jsd', beta) or ('skew', alpha), got {value!r}"
        )
    if kind in _RANGES:
        if kind == value:
            raise ValueError(f"divergence {kind!r} needs its parameter in {_RANGES[kind]}: ({kind!r}, 0.5) for example")
        if isinstance(parameter, bool) or not isinstance(parameter, numbers.Real):
            raise TypeError(f"the parameter of {kind!r} must be a number, got {type(parameter).__name__}")
        parameter = float(parameter)
        if not 0.0 <= parameter <= 1.0 or (kind == "skew" and parameter == 1.0):
            raise ValueError(f"the parameter of {kind!r} must be in {_RANGES[kind]}, got {parameter}")
    elif parameter != 0.0:
        raise ValueError(f"divergence {kind!r} has no parameter, got {value!r}")
    if parameter == 0.0:
        return REVERSE_KL if kind == "reverse_kl" else FORWARD_KL
    return REVERSE_KL if (kind, parameter) == ("jsd", 1.0) else Divergence(kind, parameter)
