"""Tiny causal language models of transformers, batches for them, and the loss from all their logits."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.cases import Case
from tests.support.truth import per_row

os.environ["HF_HUB_OFFLINE"] = "1"  # and TRL sends no telemetry

ROOT = Path(__file__).parents[2]
_path = list(sys.path)
sys.path[:] = [name for name in sys.path if Path(name or ".").resolve() != ROOT]
try:
    # transformers would take the folder `kernels` at the root for a package of that name. It remembers the answer.
    import transformers
    from transformers.utils.import_utils import is_kernels_available

    is_kernels_available()
finally:
    sys.path[:] = _path

VOCABULARY = 60
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
_LLAMA = {**_SMALL, "num_key_value_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_head": 2, "n_positions": 64}),  # tied
    "gemma2": ("Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 32}),
    "cohere": ("CohereForCausalLM", {**_LLAMA, "logit_scale": 0.4}),
    "granite": ("GraniteForCausalLM", {**_LLAMA, "logits_scaling": 2.5}),
    "phi": ("PhiForCausalLM", _LLAMA),  # a head with bias
}


def causal_lm(kind: str = "llama", width: int = 16, classes: int = VOCABULARY, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised model whose logits differ by some units, in training mode, without dropout."""
    name, settings = KINDS[kind]
    sizes = {"n_embd": width} if kind == "gpt2" else {"hidden_size": width, "intermediate_size": 2 * width}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind in ("gpt2", "phi") else {}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, name)
    config = made.config_class(
        **{"vocab_size": classes, **sizes, **settings, **dropouts, **tokens, "initializer_range": 0.3, **changes}
    )
    torch.manual_seed(seed)
    model = made(config)
    if kind == "phi":
        nn.init.normal_(model.lm_head.bias)
    return model.train()


def token_batch(B: int = 4, S: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Sequences padded on the right, whose padding and first tokens are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (B, S), generator=generator)
    lengths = torch.randint(S // 2, S + 1, (B, 1), generator=generator)
    mask = (torch.arange(S) < lengths).long()
    ids = ids.where(mask == 1, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def unfused_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor,
    weighting: Any = "confidence",
    num_items: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The loss of logits (B, S, C), where position i predicts label i + 1.

    Args:
        weighting: a name, or weights (K,) or (K, B).
    """
    C = student.shape[-1]
    target = labels[:, 1:].reshape(-1)
    z = student[:, :-1].reshape(-1, C).float()
    others = [logits[:, :-1, :C].reshape(-1, C).float().detach() for logits in teachers]
    if isinstance(weighting, Tensor):
        weighting = (
            weighting.unsqueeze(-1) if weighting.dim() == 1 else weighting.repeat_interleave(labels.shape[1] - 1, 1)
        )
        weighting = weighting.expand(len(teachers), len(target))
    options = {"temperature": 1.0, "hard_weight": 0.0, "soft_weight": 1.0, **options}
    rows = per_row(Case(z, tuple(others), target, **options), z, others, weighting)["loss"]
    kept = target != -100
    divisor = kept.sum() if num_items is None else num_items
    return rows.where(kept, 0.0).sum() / divisor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the gradient of each parameter, or to a hundredth of the largest where theory has a zero."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        error, allowed = float((found[name] - gradient).norm()), max(float(gradient.norm()), 0.01 * largest) * tolerance
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def teacher_logits(teachers: Sequence[Any], batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for t in teachers]


def teachers() -> list[Any]:
    """Two of different widths, one with a softcap, both with more classes than a student."""
    return [
        causal_lm("llama", 24, VOCABULARY + 7, seed=1).eval(),
        causal_lm("gemma2", 32, VOCABULARY + 4, seed=2).eval(),
    ]


class TokenData(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples of `token_batch`, with the columns that are given."""

    def __init__(self, size: int = 8, **columns: Any) -> None:
        batch = token_batch(size, seed=5)
        self.samples = [
            {
                **{name: value[i] for name, value in batch.items()},
                **{name: column[i] for name, column in columns.items()},
            }
            for i in range(size)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.samples[i]
