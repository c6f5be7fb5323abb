"""Strategies: how a student learns from K teachers. One class per strategy, found by name in a registry.

L = CE + alpha T^2 sum_k w_k KL_k + beta * feature term. A strategy defines w_k and the feature term:

    name            w_k                                     alpha is divided by    feature term        beta, divided by
                                                            default   official                         default  official
    ce              none                                                           none
    kd              1 for one teacher, 0 for the others     1         1            none
    aver            1/K                                     1         1            none
    ebkd            1 - H_k / sum_j H_j, sums to K-1        K-1       K            none
    aekd            min-norm, one per batch, sums to 1      1         1            none
    fitnet-mkd      1/K                                     1         1            hints, w_k = 1/K    100, 1   100, 1
    ca-mkd-logits   confidence, sums to 1                   1         K            none
    ca-mkd          confidence, sums to 1                   1         K            confidence          50, 1    50, K

By default the weights of every strategy sum to 1 after the division, so equal alpha means equal strength. With
`official_scale` the sums are those of the official code; for K = 3: 1 for kd, aver, aekd and fitnet-mkd, 2/3 for ebkd,
1/3 for ca-mkd and for its feature weights. A single teacher has weight 1 in both scales. The hint loss of the official
code has no gradient; here it has one in both scales.

A new strategy is a class with `@register` in a module of this folder: commands, studies and reports find it there.
"""

from importlib import import_module
from pkgutil import iter_modules

# isort: off
# The order of registration is the order of help texts, tables and default comparisons.
from .base import FeatureTerm, Setup, Strategy
from .registry import (
    COMMON,
    STRATEGIES,
    UNSET,
    check,
    create,
    find,
    names,
    refuse_logits_only,
    register,
    taking,
    unregister,
)
from .logits import AEKD, AVER, CE, EBKD, KD
from .features import FeatureStrategy, FitNetMKD
from .confidence import CAMKD, CAMKDLogits
# isort: on

for _module in iter_modules(__path__):  # strategies in further modules come last, by module name
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AEKD",
    "AVER",
    "CAMKD",
    "CE",
    "COMMON",
    "EBKD",
    "KD",
    "STRATEGIES",
    "UNSET",
    "CAMKDLogits",
    "FeatureStrategy",
    "FeatureTerm",
    "FitNetMKD",
    "Setup",
    "Strategy",
    "check",
    "create",
    "find",
    "names",
    "refuse_logits_only",
    "register",
    "taking",
    "unregister",
]
