"""Wrong changes of a training step: distiller, optimiser, mixing, average, the CUDA graph and what it reads."""

from . import Change, changes

GRAPH = "tests/train/test_step_graph.py"
INPUTS, AHEAD = "tests/train/test_step_inputs.py", "tests/train/test_teacher_ahead.py"
STEP = "tests/train/test_step.py"
LABELS = "tests/train/test_batch_labels.py"
MIXING = "tests/train/test_mixing.py"
AVERAGE = "tests/train/test_average.py"
OPTIMIZER = "tests/train/test_optimizer.py"
DISTILLER = "tests/train/test_distiller.py"
CALLS = "tests/train/test_distiller_calls.py"
LOOP = "tests/train/test_loop.py"
RANKS = "tests/train/test_distributed.py"
TWO = (
    f"{RANKS}::test_two_processes_have_the_gradient_and_the_sums_of_one {RANKS}::test_rank_0_decides"
    f" {RANKS}::test_only_rank_0_writes_and_evaluation_counts_all_images {RANKS}::test_invalid_worlds_are_refused"
    f" {RANKS}::test_every_image_is_seen_once_and_every_step_sees_the_same_ones"
)
OPTIONS = "tests/train/test_options.py"
CHECKPOINT = "tests/train/test_checkpoint.py"

CHANGES = (
    *changes(
        "camkd_fast/train/step_graph.py",
        GRAPH,
        Change(
            "inputs of the recording for ever",
            "        self._inputs.fill(inputs)\n",
            "        if self._replay is None:\n            self._inputs.fill(inputs)\n",
        ),
        Change(
            "the caller's tensors are recorded",
            "partial(self._work, self._inputs.tensors)",
            "partial(self._work, inputs)",
        ),
        Change(
            "no step after a refusal",
            "elif self.refusal is not None:\n            work()",
            "elif self.refusal is not None:\n            pass",
        ),
        Change(
            "recorded again after every step",
            "if self._replay is None and self._steps >= WARM_UP",
            "if self._steps >= WARM_UP",
        ),
        Change("a graph outlives what it reads", "self._inputs, self._replay, self._steps = None, None, 0", "pass"),
        Change("recorded before it is warm", "self._steps >= WARM_UP", "self._steps >= 0"),
        Change(
            "refused in silence",
            'log.warning("training steps run without a CUDA graph: %s", self',
            'log.debug("training steps run without a CUDA graph: %s", self',
        ),
        Change("a failed capture keeps its stream", "torch.cuda.set_stream(before)  # a failed", "pass  # a failed"),
        Change(
            "a failed capture keeps the generator",
            "self._capture(lambda: torch.empty(1, device=self._device).zero_())",
            "pass",
        ),
        Change("a failed graph is freed", "self._failed.append(graph)", "pass"),
        Change("the last error of a refusal", "while error.__context__ is not None:", "while False:"),
        Change(
            "a run of several processes is recorded",
            "if world.size > 1:\n        log",
            "if world.size > 99:\n        log",
        ),
    ),
    *changes(
        "camkd_fast/train/step.py",
        GRAPH,
        Change(
            "batches of any size are replayed",
            "images == num_items == self._full_batch",
            "images == self._full_batch",
        ),
        Change("the rate of the recording", "rate.float(), number)", "float(rate), number)"),
        Change("the step's number of the recording", "rate.float(), number)", "rate.float(), float(number))"),
        Change("images are counted once", "self.sums.count(images)", "self.sums.count(0 if self._graph else images)"),
        Change("images of another loader", "self._forget()\n        self._finish", "pass\n        self._finish"),
        Change("a loaded state misses the graph", "self._forget()  # the optimiser has new buffers", "pass"),
    ),
    *changes(
        "camkd_fast/train/step_inputs.py",
        INPUTS,
        Change("the record never leaves the host", "record.copy_(self._record, non_blocking=True)", "pass"),
        Change("inputs on the device are not copied", "mine.copy_(tensor, non_blocking=True)", "pass"),
        Change("parts of a record lie close together", "-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT", "tensor.nbytes"),
        Change(
            "strides are lost",
            "part.as_strided(form.shape, form.stride(), part.storage_offset())",
            "part.view(form.shape)",
        ),
    ),
    *changes(
        "camkd_fast/train/teacher_ahead.py",
        AHEAD,
        Change("whatever is ready is the batch", "if self._batch is not batch:", "if self._batch is None:"),
        Change(
            "a smaller batch runs ahead",
            "fits = following is not None and len(following.target) == len(batch.target)",
            "fits = following is not None",
        ),
        Change("a batch of another loader runs ahead", "following.finish is batch.finish", "True"),
        Change("outputs of the first batch for ever", "_copy(following, ready)", "pass"),
        Change("the recorded memory is replaced", "if self._ready is None:\n", "if True:\n"),
        Change("teachers draw the step's numbers", "if not torch.equal(generator.get_state(), state):", "if False:"),
        Change("the teachers' draws are kept", "generator.set_state(state)", "pass"),
        Change("asked for in vain and in silence", 'precision.teacher_ahead == "on":', "False:"),
        Change("a cache runs ahead", "elif not teachers.computes:", "elif False:"),
        Change("batches are read early for nothing", "if not ahead:", "if False:"),
        Change("the last batch is left out", "if ahead and before is not None:", "if False:"),
    ),
    *changes(
        "camkd_fast/train/step.py",
        STEP,
        Change(
            "rank is not in the seed",
            "self._seed, self._world.rank, number",
            "self._seed, number",
            tests=f"{RANKS}::test_ranks_draw_different_dropout_masks",
        ),
        Change("step is not in the seed", "self._seed, self._world.rank, number)", "self._seed, self._world.rank)"),
        Change("gradients accumulate", "self.optimizer.zero_grad(set_to_none=True)", "pass"),
        Change(
            "gradients not scaled for DDP",
            "float(world.size), device=world.device)",
            "1.0, device=world.device)",
            tests=TWO,
        ),
        Change("the scaler is not updated", "self.scaler.update()", "pass"),
        Change(
            "autocast whatever the dtype",
            "enabled=self._dtype != torch.float32",
            "enabled=True",
            equivalent="torch refuses float32 autocast on a CPU with a warning and disables it",
        ),
        Change("no autocast", "enabled=self._dtype != torch.float32", "enabled=False", tests=f"{OPTIONS} {STEP}"),
        Change(
            "momentum is not saved",
            '"optimizer": optimizer,\n',
            '"optimizer": {},\n',
            tests=CHECKPOINT,
        ),
        Change(
            "scaler is not restored",
            'self.scaler.load_state_dict(state["scaler"])',
            "pass",
            tests=f"{OPTIONS} {CHECKPOINT}",
        ),
    ),
    *changes(
        "camkd_fast/train/step.py",
        OPTIMIZER,
        Change("scaled gradients are clipped", "self.scaler.unscale_(self.optimizer)", "pass"),
        Change(
            "nothing is clipped", "nn.utils.clip_grad_norm_(self.trainable.parameters(), self._largest_norm)", "pass"
        ),
    ),
    *changes(
        "camkd_fast/train/batch_labels.py",
        LABELS,
        Change(
            "ignored rows are smoothed",
            "torch.where(self.kept().unsqueeze(-1), onehot - 1 / C, 0.0)",
            "onehot - 1 / C",
        ),
        Change("the label loses all of its share", "onehot - 1 / C", "onehot"),
        Change("one ignored label for all formulas", "self.target != self.ignore_index", "self.target != -100"),
        Change(
            "the shares are swapped",
            "((first, mix), (self.second_target.reshape(-1), 1 - mix))",
            "((first, 1 - mix), (self.second_target.reshape(-1), mix))",
        ),
        Change("accuracy of the smaller share", "self.mix >= 0.5", "self.mix < 0.5"),
    ),
    *changes(
        "camkd_fast/train/distiller.py",
        LABELS,
        Change(
            "the strategy is emptied",
            "self.strategy.to_device(device)",
            "self.strategy.to_empty(device=device)",
            tests="tests/train/test_distiller_options.py",
        ),
        Change(
            "teachers are emptied",
            "if _loses_values(fn):",
            "if False:",
            tests="tests/train/test_distiller.py",
        ),
        Change("smoothing has no gradient", "gradient.add_(slope.to(gradient.dtype))", "pass"),
        Change("ignored rows count in the accuracy", "correct = correct & labels.kept()", "pass"),
        Change("smoothing is not logged", "hard + smoothing.detach()", "hard"),
        Change(
            "second labels do not reach the weights",
            "formula.replaced(weighting=weighting).options(), **labels.second()}",
            "formula.replaced(weighting=weighting).options()}",
        ),
    ),
    *changes(
        "camkd_fast/train/mixing.py",
        MIXING,
        Change("the same numbers in every step", "self._rank, step)", "self._rank, 0)"),
        Change("the same numbers in every process", "self._seed, self._rank, step)", "self._seed, 0, step)"),
        Change("CutMix only", "choice < 0.5", "True"),
        Change("the share of the uncut box", "own * (1.0 - height * width / (H * W))", "own * (1.0 - 4 * half * half)"),
        Change("the box has the own image", "inside_columns, 0.0, own)", "inside_columns, own, 0.0)"),
        Change(
            "labels of other partners", "target.index_select(0, partner)", "target.index_select(0, partner.flip(0))"
        ),
        Change("contiguous images", "out=torch.empty_like(images)", "out=torch.empty(images.shape)"),
    ),
    *changes(
        "camkd_fast/train/step.py",
        MIXING,
        Change("numbers of the step before", "number + (prepared is not batch)", "number"),
        Change("the student sees one label", "num_items, scale, *second)", "num_items, scale)"),
    ),
    *changes(
        "camkd_fast/train/average.py",
        AVERAGE,
        Change("the decay is the weight", "self._least = 1.0 - decay", "self._least = decay"),
        Change(
            "the first step's weight for ever",
            "max(self._least, _FIRST / (number + _LATER))",
            "max(self._least, _FIRST / (1.0 + _LATER))",
        ),
        Change("counters are averaged", "1 if taken is None else taken.long())", "0)"),
        Change(
            "buffers are left out", "return [*module.parameters(), *module.buffers()]", "return [*module.parameters()]"
        ),
        Change("skipped steps count", "weight if taken is None else weight * taken)", "weight)"),
    ),
    *changes(
        "camkd_fast/train/step.py",
        AVERAGE,
        Change(
            "every step seems skipped",
            "(self.scaler.scale(self._scale) >= scale)",
            "(self.scaler.scale(self._scale) > scale)",
        ),
        Change("the average is not restored", 'self.average.module.load_state_dict(state["average"])', "pass"),
    ),
    *changes(
        "camkd_fast/train/optimizer.py",
        f"{OPTIMIZER} {OPTIONS}",
        Change("default momentum", "lr=1.0, momentum=optim.momentum, nesterov", "lr=1.0, momentum=0.9, nesterov"),
        Change("no Nesterov momentum", "nesterov=True", "nesterov=False"),
        Change(
            "no weight decay",
            '"params": list(parameters), "weight_decay": optim.weight_decay',
            '"params": list(parameters)',
        ),
        Change("norms decay", '"weight_decay": 0.0}', '"weight_decay": optim.weight_decay}'),
        Change(
            "only weights are trained",
            "parameters = [p for p in module.parameters() if p.requires_grad]",
            "parameters = [p for p in module.parameters() if p.dim() >= 2]",
        ),
        Change("Muon skips the decay", "1.0 - rate * self._decay", "1.0"),
        Change("Muon's directions add up", "direction.zero_()", "pass"),
        Change("Muon's momentum is not saved", '"muon": self._muon.state_dict()["state"]', '"muon": {}'),
        Change("Muon's gradients accumulate", "weight.grad = None", "pass"),
        Change("a step without a gradient decays", "if pair[0].grad is not None]", "]"),
    ),
    *changes(
        "camkd_fast/train/distiller.py",
        STEP,
        Change(
            "divided by the images of this process",
            '{"num_items": num_items, "loss_scale": scale, **options}',
            '{"num_items": len(logits), "loss_scale": scale, **options}',
        ),
        Change("loss scale left out", '"num_items": num_items, "loss_scale": scale, ', '"num_items": num_items, '),
        Change(
            "channels_last dropped",
            "self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]",
            "pass",
        ),
        Change(
            "feature loss is not part of the logged loss",
            "torch.stack([loss + feature, hard, soft, feature])",
            "torch.stack([loss, hard, soft, feature])",
        ),
        Change(
            "gradient of the feature loss not scaled",
            "target, num_items, scale, **labels.second())",
            "target, num_items, torch.ones_like(scale), **labels.second())",
            tests=f"{STEP} {RANKS}::test_two_processes_have_the_gradient_and_the_sums_of_one",
        ),
        Change(
            "teachers do not move",
            "teachers.move(move)",
            "pass",
            tests=DISTILLER,
        ),
        Change(
            "the divisor of labels is ignored",
            "labels.cross_entropy(_wide(logits), self.label_smoothing, num_items)",
            "labels.cross_entropy(_wide(logits), self.label_smoothing, None)",
            tests=DISTILLER,
        ),
        Change("feature loss left out", "DistillerOutput(loss + feature,", "DistillerOutput(loss,", tests=DISTILLER),
        Change("an option does not arrive", '"alpha": alpha, ', "", tests=DISTILLER),
        Change(
            "images in the caller's layout",
            "images = images.contiguous(memory_format=torch.channels_last)",
            "pass",
            equivalent="a convolution with channels_last weights converts its input itself",
        ),
    ),
    *changes(
        "camkd_fast/train/teachers/given.py",
        DISTILLER,
        Change("teachers of their own dtype", "freeze(source.model, dtype, channels_last)", "freeze(source.model)"),
        Change("classes in the teacher's order", "if order is not None:", "if False:"),
        Change("images as the student's", "if images.preprocessing is None:", "if True:"),
    ),
    *changes(
        "camkd_fast/models/observer.py",
        DISTILLER,
        Change("modules stay in evaluation mode", "module.training = True", "pass"),
        Change("maps are changed later", "copies=True", "copies=False", tests=CALLS),
        Change("maps without gradients", "and not calls[0].learns:", "and False:", tests=CALLS),
        Change("an output of any shape", "kept.dim() != 4", "False"),
        Change("the module may run twice", "len(calls) != 1 or", "not calls or"),
    ),
    *changes(
        "camkd_fast/models/protocol.py",
        CALLS,
        Change("hooks are passed over", "if any(hooks) or", "if"),
        Change("a forward of the instance is passed over", '"forward" in module.__dict__ or', ""),
        Change("compilation is passed over", "or module._compiled_call_impl is not None", ""),
        Change("a subclass's forward is passed over", '.startswith(("camkd_fast.", "timm."))', ".startswith('')"),
        Change(
            "a wrapper's model is passed over",
            "(not isinstance(model, Wrapper) or composes(model.model))",
            "True",
            tests="tests/models/test_timm_models.py",
        ),
        Change(
            "hooks of a wrapper are passed over",
            "isinstance(model, Wrapper) and _has_known_forward(model)",
            "isinstance(model, Wrapper)",
            tests="tests/train/test_distiller_options.py",
        ),
        Change("maps of the protocol without gradients", "and not maps[0].learns:", "and False:"),
    ),
    *changes(
        "camkd_fast/models/recorded.py",
        CALLS,
        Change("hooks of the module are passed over", 'if name == "forward" and module._forward_hooks:', "if False:"),
    ),
    *changes(
        "camkd_fast/train/sums.py",
        f"{STEP}::test_sums_are_over_images_whatever_the_batches {STEP}::test_first_bad_step_and_its_parts_are_named"
        f" {STEP}::test_sums_start_again_and_take_over_what_a_checkpoint_holds",
        Change(
            "the last bad step instead of the first",
            "first = (self._bad_step < 0) & ~numbers[0].isfinite()",
            "first = ~numbers[0].isfinite()",
        ),
        Change("sums of an unfinished epoch left out", "Reading(totals.plus(self.base),", "Reading(totals,"),
        Change(
            "teachers are never the reason",
            "if math.isfinite(hard) and math.isnan(soft):",
            "if False:",
            tests="tests/train/test_loop.py",
        ),
        Change(
            "feature weights among the weights",
            "rest[: self._num_weights], rest[self._num_weights :]",
            "rest, rest[self._num_weights :]",
        ),
        Change(
            "accuracy per batch",
            '"train_accuracy": self.correct / images',
            '"train_accuracy": self.correct',
            tests=LOOP,
        ),
    ),
    *changes(
        "camkd_fast/losses/min_norm.py",
        "tests/train/test_min_norm.py",
        Change(
            "the cap is ignored",
            "slack = torch.stack([uniform, cap - uniform])",
            "slack = torch.stack([uniform, 1.0 - uniform])",
        ),
        Change("half the steps", "STEPS = 20", "STEPS = 6"),
    ),
)
