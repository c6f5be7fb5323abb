"""Weights of a checkpoint into a model: nothing missing, nothing left over, every shape the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

_LISTED = 10  # names of each kind in an error
_COUNTER = ".num_batches_tracked"  # unused in evaluation mode; torch before 0.4.1 did not write it


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    source: object,
    names: Mapping[str, str] | None = None,
) -> nn.Module:
    """Copy tensors into a model, which is returned in evaluation mode.

    They take the model's dtypes. A batch norm's `num_batches_tracked` may be missing.

    Args:
        name: of the model, for errors.
        source: of the tensors, likewise.
        names: the checkpoint's name of each parameter and buffer -> the model's; None: they are equal.

    Raises:
        ValueError: tensors are missing or left over, of which the message lists up to ten each; or a shape differs, in
            which case it has both.
    """
    own = model.state_dict()
    names = {key: key for key in own} if names is None else names
    missing = [key for key in names if key not in tensors and not key.endswith(_COUNTER)]
    extra = [key for key in tensors if key not in names]
    faults = [f"it lacks {_listed(missing)}"] * bool(missing) + [f"{name} has no {_listed(extra)}"] * bool(extra)
    if faults:
        raise ValueError(f"{source} does not fit {name}: {'; '.join(faults)}")
    for key, tensor in tensors.items():
        theirs, needed = tuple(tensor.shape), tuple(own[names[key]].shape)
        if theirs != needed:
            raise ValueError(f"{source} does not fit {name}: {key} has shape {theirs}, but {name} needs {needed}")
    # In the model's own mapping, which has the versions of its modules: torchvision's MNASNet refuses to load without.
    own.update({names[key]: tensor for key, tensor in tensors.items()})
    model.load_state_dict(own)
    return model.eval()


def size(tensors: Mapping[str, Tensor], key: str, axis: int) -> int:
    """Size of a tensor along an axis; 1 if `fill` is going to refuse it."""
    tensor = tensors.get(key)
    return max(1, tensor.shape[axis]) if tensor is not None and tensor.dim() > axis else 1


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
