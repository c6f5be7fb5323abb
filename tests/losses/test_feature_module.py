"""CAMKDFeatureLoss: regressors, resizing to any teacher, detached and attached weights (eq. 5 and 6)."""

import pytest
import torch
from torch import nn

from camkd_fast import CAMKDFeatureLoss
from tests.support.tolerance import assert_near

# Channels, height and width. The student has 4 x 4: equal, larger, smaller, one side smaller and one larger.
TEACHERS = [(6, 4, 4), (8, 7, 7), (5, 2, 2), (7, 2, 6)]


class Head(nn.Module):
    """A frozen teacher head: pooling and a classifier."""

    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, classes).requires_grad_(False)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return self.classifier(feature.mean((2, 3)))


def build(backend: str, shapes=TEACHERS, **options):
    torch.manual_seed(3)
    module = CAMKDFeatureLoss(3, [s[0] for s in shapes], backend=backend, **options)
    heads = [Head(s[0]) for s in shapes]
    student = torch.randn(5, 3, 4, 4)
    teachers = [torch.rand(5, *s) for s in shapes]
    return module, heads, student, teachers, torch.tensor([1, 0, 9, 3, 3])


def eager(module, heads, student, teachers, target, detach=True):
    """The published formulas in eager PyTorch, with the module's own regressors."""
    kept = target != -100
    total, ces, regressed = 0.0, [], []
    for regressor, teacher in zip(module.regressors, teachers, strict=True):
        H, W = teacher.shape[-2:]
        resized = nn.functional.adaptive_avg_pool2d(student, (min(H, 4), min(W, 4)))
        resized = nn.functional.interpolate(resized, size=(H, W), mode="nearest")
        regressed.append(regressor(resized))
    for head, r in zip(heads, regressed, strict=True):
        ces.append(nn.functional.cross_entropy(head(r), target.clamp(min=0), reduction="none"))
    ce = torch.stack(ces)
    weights = ((1 - ce.softmax(0)) / (len(heads) - 1) if len(heads) > 1 else 1 + 0 * ce) * kept
    for w, r, f in zip(weights.detach() if detach else weights, regressed, teachers, strict=True):
        total = total + (w * (f - r).square().mean((1, 2, 3))).sum()
    return total / kept.sum().clamp(min=1), weights, ce * kept


def double(*items):
    return [
        item.double() if isinstance(item, (nn.Module, torch.Tensor)) else [x.double() for x in item] for item in items
    ]


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("K", [1, 4])
def test_loss_and_gradients(K, detach, backend):
    module, heads, student, teachers, target = build(backend, TEACHERS[:K], detach_weights=detach)
    target[2] = -100
    student.requires_grad_()
    out = module(student, teachers, heads, target)
    out.loss.backward()
    ours = [student.grad, *(p.grad for p in module.parameters())]
    assert out.weights.requires_grad is not detach or K == 1
    if detach:
        assert not out.weights.requires_grad and not out.teacher_ce.requires_grad

    twin, exact_heads, exact_student, exact_teachers, _ = build(backend, TEACHERS[:K], detach_weights=detach)
    twin, exact_student, exact_teachers = double(twin, exact_student, exact_teachers)
    exact_student.requires_grad_()
    loss, weights, ce = eager(twin, double(*exact_heads), exact_student, exact_teachers, target, detach)
    loss.backward()
    assert_near(out.loss, loss.float())
    assert_near(out.weights, weights.float())
    assert_near(out.teacher_ce, ce.float())
    for actual, expected in zip(ours, [exact_student.grad, *(p.grad for p in twin.parameters())], strict=True):
        # Batch normalisation over 20 to 245 values amplifies float32 rounding.
        assert_near(actual, expected.float(), rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_map_is_the_relu_of_a_normalised_1x1_convolution(training):
    module, _, _, teachers, _ = build("reference")
    for regressor, teacher in zip(module.train(training).regressors, teachers, strict=True):
        conv, norm = (
            next(m for m in regressor.modules() if isinstance(m, kind)) for kind in (nn.Conv2d, nn.BatchNorm2d)
        )
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
        statistics = (None, None) if training else (norm.running_mean, norm.running_var)
        x = torch.randn(5, 3, *teacher.shape[2:])
        linear = torch.einsum("dc,nchw->ndhw", conv.weight[:, :, 0, 0], x)
        expected = nn.functional.batch_norm(linear, *statistics, norm.weight, norm.bias, training).relu()
        assert conv.bias is None and (expected == 0).any()
        assert_near(regressor(x).detach(), expected.detach(), rtol=1e-5)


def test_attached_weights_change_the_gradient(backend):
    gradients = []
    for detach in (True, False):
        module, heads, student, teachers, target = build(backend, detach_weights=detach)
        module(student, teachers, heads, target).loss.backward()
        gradients.append(module.regressors[0][0].weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_resizing_starts_from_the_original_map_each_time(backend):
    # The official code resizes the map that it resized for the teacher before, so that the order of teachers matters.
    shapes = [TEACHERS[2], TEACHERS[0]]
    module, heads, student, teachers, target = build(backend, shapes)
    forwards = module(student, teachers, heads, target).loss
    module.regressors = nn.ModuleList(reversed(module.regressors))
    backwards = module(student, teachers[::-1], heads[::-1], target).loss
    assert_near(forwards, backwards)


def test_channels_last_and_bfloat16_autocast(backend):
    module, heads, student, teachers, target = build(backend)
    expected = module(student, teachers, heads, target)
    last = torch.channels_last
    module = module.to(memory_format=last)
    out = module(student.to(memory_format=last), [f.to(memory_format=last) for f in teachers], heads, target)
    assert_near(out.loss, expected.loss)
    assert_near(out.weights, expected.weights)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = module(student, [f.bfloat16() for f in teachers], heads, target)
    narrow.loss.backward()
    assert_near(narrow.loss, expected.loss, rtol=0.02)


def test_ignored_rows(backend):
    module, heads, student, teachers, target = build(backend)
    module.eval()
    target[1:] = -100
    out = module(student, teachers, heads, target)
    single = module(student[:1], [f[:1] for f in teachers], heads, target[:1])
    assert_near(out.loss, single.loss)
    assert (out.weights[:, 1:] == 0).all()
    target[:] = -100
    out = module(student, teachers, heads, target)
    out.loss.backward()
    assert out.loss == 0 and all((p.grad == 0).all() for p in module.parameters())


def test_a_few_steps_reduce_the_loss_and_do_not_change_the_heads(backend):
    module, heads, student, teachers, target = build(backend, detach_weights=False)
    before = [head.classifier.weight.clone() for head in heads]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    losses = []
    for _ in range(30):
        loss = module(student, teachers, heads, target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(head.classifier.weight, old) for head, old in zip(heads, before, strict=True))


def test_a_head_that_works_in_place_is_refused() -> None:
    loss, maps = CAMKDFeatureLoss(4, [8]), torch.randn(3, 4, 2, 2)
    heads = [nn.Sequential(nn.SiLU(inplace=inplace), nn.Flatten()) for inplace in (False, True)]
    labels = torch.zeros(3, dtype=torch.int64)
    loss(maps, [torch.randn(3, 8, 2, 2)], heads[:1], labels)
    for call in (loss, loss.loss_and_grad):
        with pytest.raises(ValueError, match=r"teacher_heads\[0\] changes its input in place"):
            call(maps, [torch.randn(3, 8, 2, 2)], heads[1:], labels)


@pytest.mark.parametrize("option", [{"ignore_index": 1}, {"backend": "cpu"}])
def test_a_call_cannot_have_other_settings_than_its_module(option: dict[str, object]) -> None:
    loss, maps = CAMKDFeatureLoss(4, [8]), torch.randn(3, 4, 2, 2)
    (name, value), labels = *option.items(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=f"{name} is .* in this module, got {value!r} for a call"):
        loss.loss_and_grad(maps, [torch.randn(3, 8, 2, 2)], [Head(8)], labels, **option)


def test_settings_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'tpu'"):
        CAMKDFeatureLoss(4, [8], backend="tpu")
    with pytest.raises(TypeError, match="ignore_index must be an int, got str"):
        CAMKDFeatureLoss(4, [8], ignore_index="none")  # type: ignore[arg-type]
