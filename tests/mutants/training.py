"""Wrong changes of camkd_fast/train: the step, the loop, checkpoints, runs."""

from . import Change, changes

GRAPH = "tests/train/test_step_graph.py"
INPUTS, AHEAD = "tests/train/test_step_inputs.py", "tests/train/test_teacher_ahead.py"
STEP = "tests/train/test_step.py"
LABELS = "tests/train/test_batch_labels.py"
MIXING = "tests/train/test_mixing.py"
AVERAGE = "tests/train/test_average.py"
OPTIMIZER = "tests/train/test_optimizer.py"
DISTILLER = "tests/train/test_distiller.py"
LOOP = "tests/train/test_loop.py"
JOBS = "tests/train/test_jobs.py"
RANKS = "tests/train/test_distributed.py"
TWO = (
    f"{RANKS}::test_two_processes_have_the_gradient_and_the_sums_of_one {RANKS}::test_rank_0_decides"
    f" {RANKS}::test_only_rank_0_writes_and_evaluation_counts_all_images {RANKS}::test_invalid_worlds_are_refused"
    f" {RANKS}::test_every_image_is_seen_once_and_every_step_sees_the_same_ones"
)
OPTIONS = "tests/train/test_options.py"
CHECKPOINT = "tests/train/test_checkpoint.py"
RATES = (
    f"{OPTIONS}::test_the_rate_follows_the_config {STEP}::test_cosine_constant_and_warmup {STEP}::test_paper_rates_by_model"
    f" {STEP}::test_paper_schedule_drops_after_150_180_and_210_epochs {STEP}::test_short_runs_drop_at_the_same_shares"
)

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
        "camkd_fast/train/trainer.py",
        AHEAD,
        Change(
            "a batch that was read ahead counts as used", "unused=int(self._ahead and totals is not None)", "unused=0"
        ),
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
            "torch.where((self.target != IGNORED)[:, None], onehot - 1 / C, 0.0)",
            "onehot - 1 / C",
        ),
        Change("the label loses all of its share", "onehot - 1 / C", "onehot"),
        Change(
            "the shares are swapped",
            "((self.target, mix), (self.second_target, 1 - mix))",
            "((self.target, 1 - mix), (self.second_target, mix))",
        ),
        Change("accuracy of the smaller share", "self.mix >= 0.5", "self.mix < 0.5"),
    ),
    *changes(
        "camkd_fast/train/distiller.py",
        LABELS,
        Change("smoothing has no gradient", "gradient.add_(slope.to(gradient.dtype))", "pass"),
        Change("smoothing is not logged", "hard=losses.hard + smoothing)", "hard=losses.hard)"),
        Change(
            "second labels do not reach the weights",
            "formula._replace(weighting=weighting).options(), **labels.second}",
            "formula._replace(weighting=weighting).options()}",
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
            "target, num_items, scale, **labels.second)",
            "target, num_items, torch.ones_like(scale), **labels.second)",
            tests=f"{STEP} {RANKS}::test_two_processes_have_the_gradient_and_the_sums_of_one",
        ),
        Change("teachers do not move", "teachers.move(fn)", "pass", tests=DISTILLER),
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
        Change(
            "outputs of other calls are kept",
            "            self._seen = None\n        (features",
            "            pass\n        (features",
        ),
        Change("modules stay in evaluation mode", "module.training = True", "pass"),
        Change("an output of any shape", "features.dim() != 4", "False"),
        Change("the module may run twice", "if more or", "if"),
    ),
    *changes(
        "camkd_fast/train/trainer.py",
        LOOP,
        Change(
            "rate of the step before",
            "self._rate(self.position), self.position,",
            "self._rate(max(self.position - 1, 0)), self.position,",
            tests=f"{LOOP}::test_each_step_has_the_rate_of_its_own_number",
        ),
        Change("evaluation in training mode", "model.eval()\n    sums", "sums"),
        Change("mean loss per batch", 'reduction="sum")\n        correct', 'reduction="mean")\n        correct'),
        Change("no validation after the last epoch", "or last == self.steps):", ")and True:"),
        Change(
            "log position is not restored",
            'self._logged = None if state["logged"] is None else Totals(*state["logged"])',
            "self._logged = None",
            tests=CHECKPOINT,
        ),
        Change(
            "sums of an unfinished epoch are not restored",
            'self.step.sums.base = None if state["totals"] is None else Totals(*state["totals"])',
            "pass",
            tests=CHECKPOINT,
        ),
        Change(
            "loader starts the epoch again", 'self.train.load_state_dict(state["loader"])', "pass", tests=CHECKPOINT
        ),
        Change(
            "buffers of this rank in the validation",
            "self.world.copy_buffers(self.step.student)\n            validation",
            "validation",
            tests=f"{LOOP}::test_every_validation_is_of_the_exchanged_statistics",
        ),
        Change(
            "batches of one process",
            "optim.batch_size // world.size, world.size, shuffle=True)",
            "optim.batch_size, world.size, shuffle=True)",
            tests=TWO,
        ),
        Change(
            "calibration bins shifted",
            "((confidence * BINS).ceil().long() - 1)",
            "(confidence * BINS).long()",
            tests="tests/train/test_calibration.py",
            equivalent="no float32 below 1 is a multiple of 1/15, so no confidence lies on the edge of a bin",
        ),
        Change("a checkpoint of every rank", "if not self.world.is_main:\n            return", "", tests=TWO),
        Change(
            "a checkpoint one step late",
            "save = every > 0 and self.position % every == 0",
            "save = every > 0 and self.position % every == 1 % every",
            tests=f"{LOOP}::test_checkpoints_are_of_these_steps_and_of_every_epochs_end",
        ),
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
        "camkd_fast/train/schedule.py",
        RATES,
        Change("drop one step late", "step >= drop for", "step > drop for"),
        Change("warmup from 0", "peak * (step + 1) / warmup", "peak * step / warmup"),
        Change("cosine counts the warmup", "(step - warmup) / (total - warmup)", "step / total"),
        Change("own factor of the drop ignored", "optim.drop ** sum", "0.1 ** sum", tests=RATES),
        Change(
            "own milestones ignored",
            "for at in optim.milestones)",
            "for at in (0.625, 0.75, 0.875))",
            tests=RATES,
        ),
        Change(
            "own rate ignored for slow models",
            "if optim.learning_rate is not None:",
            "if optim.learning_rate is not None and model not in ('mobilenetv2', 'shufflenetv1'):",
            tests=RATES,
        ),
    ),
    *changes(
        "camkd_fast/train/distributed.py",
        TWO,
        Change("uneven batches are cut", "if batch_size % world.size:", "if False:"),
        Change(
            "buffers are not exchanged",
            "for buffer in module.buffers():\n                dist.broadcast(buffer, src=0)",
            "pass",
            tests=TWO,
        ),
        Change(
            "this rank's number",
            "return int(self.gather(torch.tensor([number], device=self.device))[0])",
            "return number",
            tests=f"{RANKS}::test_rank_0_decides",
        ),
    ),
    *changes(
        "camkd_fast/train/checkpoint.py",
        CHECKPOINT,
        Change("one checkpoint is kept", "KEEP = 2", "KEEP = 1"),
        Change(
            "the oldest checkpoint",
            'sorted(self.folder.glob("step-*"), reverse=True)',
            'sorted(self.folder.glob("step-*"))',
        ),
        Change(
            "hash of the state is not checked",
            "for name in (MODEL, STATE):\n            if hashlib",
            "for name in (MODEL,):\n            if hashlib",
        ),
        Change("any pickle is loaded", "weights_only=True)\n    except", "weights_only=False)\n    except"),
        Change("damaged later checkpoints stay", "if passed >= path:", "if False:"),
    ),
    *changes(
        "camkd_fast/train/run.py",
        f"{OPTIONS} {JOBS}::test_augmentation_by_default",
        Change("official_scale dropped", "        official_scale=config.official_scale,\n", ""),
        Change("detach_weights dropped", "        detach_weights=config.detach,\n", ""),
        Change("uniform dropped", "        uniform=config.uniform,\n", ""),
        Change("temperature dropped", "        temperature=config.temperature,\n", ""),
        Change("beta dropped", "        beta=config.beta,\n", ""),
        Change("alpha dropped", "        alpha=config.alpha,\n", ""),
        Change("teacher_index dropped", "        teacher_index=config.teacher_index,\n", ""),
        Change(
            "loader option dropped",
            "choose.loader(images, settings, config.data.loader)))\n\n        for_evaluation",
            "choose.loader(images, settings)))\n\n        for_evaluation",
        ),
        Change(
            "validation images are augmented",
            "for_evaluation = loader_config(config, world, EVALUATION_BATCH, None)",
            "for_evaluation = settings",
            tests=f"{JOBS}::test_teach_leaves_a_run_that_can_be_evaluated",
        ),
        Change(
            "test result of rank 0's buffers only",
            "world.copy_buffers(step.student)\n    test",
            "test",
            tests=f"{RANKS}::test_the_test_result_is_that_of_the_saved_model",
        ),
        Change(
            "training accuracy as test accuracy",
            "loader(parts.test, for_test), journal",
            "loader(parts.train, for_test), journal",
            tests=f"{JOBS}::test_teach_leaves_a_run_that_can_be_evaluated",
        ),
        Change(
            "deterministic only if asked",
            'or (precision.deterministic == "auto" and device.type == "cpu")',
            "",
            tests=OPTIONS,
        ),
    ),
    *changes(
        "camkd_fast/train/run_images.py",
        f"{OPTIONS} {JOBS}::test_augmentation_by_default",
        Change("view seed dropped", "        view_seed=config.data.view_seed,\n", ""),
        Change("views dropped", "        views=config.data.views,\n", ""),
        Change("skip_bad dropped", "        skip_bad=config.data.skip_bad,\n", ""),
        Change("workers dropped", "if config.data.workers is None else config.data.workers", ""),
        Change("channels_last dropped from the loader", "        channels_last=config.precision.channels_last,\n", ""),
        Change(
            "split seed dropped", "config.data, config.root, split_seed=config.split_seed,", "config.data, config.root,"
        ),
        Change(
            "images of the first split for every seed",
            "[config.data.images], config.data.split_seed)",
            "[config.data.images], 0)",
        ),
        Change(
            "swapped labels dropped",
            "if isinstance(config, TeachConfig) and config.swapped:",
            "if False:",
            tests=f"{JOBS}::test_same_seed_same_bytes_and_the_callers_random_numbers_stay",
        ),
    ),
    *changes(
        "camkd_fast/train/initial_weights.py",
        "tests/train/test_initial_weights.py",
        Change(
            "student's seed ignored",
            "torch.manual_seed(config.seed)",
            "torch.manual_seed(0)",
            tests=f"{OPTIONS}::test_the_students_seed_decides_its_first_weights",
        ),
        Change("read again on resume", " or world.broadcast(resume and run_folder.has_checkpoint(config))", ""),
        Change("the classifier of the source's size", "{**theirs, **{name: own[name] for name in drawn}}", "theirs"),
        Change("a split source passes", "if isinstance(found.model, Split):", "if False:"),
    ),
    *changes(
        "camkd_fast/train/run_folder.py",
        JOBS,
        Change(
            "teachers may differ on resume",
            '*("out", "teacher_cache"',
            '*("out", "teachers", "teacher_cache"',
            tests=f"{OPTIONS} {JOBS}",
        ),
    ),
    *changes(
        "camkd_fast/train/journal.py",
        f"tests/train/test_journal.py {CHECKPOINT}",
        Change(
            "records of the resumed part twice",
            'if r["step"] <= step and r["kind"] != "test"',
            'if r["kind"] != "test"',
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
    *changes(
        "camkd_fast/train/config_file.py",
        "tests/train/test_config.py",
        Change("differences of the first config only", "for name in {**one, **two} if", "for name in one if"),
    ),
)
