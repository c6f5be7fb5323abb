"""Wrong changes of camkd_fast/train: the loop, checkpoints, processes, runs."""

from . import Change, changes

INPUTS, AHEAD = "tests/train/test_step_inputs.py", "tests/train/test_teacher_ahead.py"
STEP = "tests/train/test_step.py"
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
        "camkd_fast/train/trainer.py",
        AHEAD,
        Change(
            "a batch that was read ahead counts as used", "unused=int(self._ahead and totals is not None)", "unused=0"
        ),
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
        "camkd_fast/train/schedule.py",
        RATES,
        Change("drop one step late", "step >= drop for", "step > drop for"),
        Change("warmup from 0", "peak * (step + 1) / warmup", "peak * step / warmup"),
        Change("cosine counts the warmup", "(step - warmup) / decay", "step / total"),
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
            "every group meets at the same place",
            'f"camkd_fast/{next(_groups)}"',
            '"camkd_fast"',
            tests=f"{RANKS}::test_rank_0_decides",
        ),
        Change(
            "errors of rank 0 are unknown to the others",
            "if fault is not None:",
            "if False:",
            tests=f"{RANKS}::test_rank_0_decides",
        ),
        Change(
            "an error that pickle cannot read ends the others",
            "pickle.loads(pickle.dumps(error))",
            "pickle.dumps(error)",
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
        Change("read again on resume", " or world.on_main(lambda: resume and run_folder.has_checkpoint(config))", ""),
        Change("the classifier of the source's size", "{**theirs, **{name: own[name] for name in drawn}}", "theirs"),
        Change("a split source passes", "if isinstance(found.model, Split):", "if False:"),
    ),
    *changes(
        "camkd_fast/train/run_teachers.py",
        "tests/train/test_run_teachers.py",
        Change("another teacher goes unnoticed", "if source == name and old != new:", "if False:"),
        Change(
            "teachers of a stopped run stay",
            "if teachers and (anew or not path.exists()):",
            "if teachers and not path.exists():",
        ),
        Change("processes are not compared", "if number != first:", "if False:"),
    ),
    *changes(
        "camkd_fast/train/run_folder.py",
        JOBS,
        Change(
            "a run may overwrite its teachers",
            "        _check_kept(config)",
            "        pass",
            tests="tests/train/test_run_folder.py",
        ),
        Change(
            "folders above a source do not count",
            "not removed.isdisjoint([real, *real.parents])",
            "real in removed",
            tests="tests/train/test_run_folder.py",
        ),
        Change(
            "teachers may differ on resume",
            '*("out", "teacher_cache"',
            '*("out", "teachers", "teacher_cache"',
            tests=f"{OPTIONS} {JOBS}",
        ),
        Change(
            "a cache may come or go on resume",
            "and (old is None or new is None):",
            "and False:",
            tests="tests/train/test_run_folder.py",
        ),
        Change(
            "a name frees those that begin with it",
            'free.endswith(".") and name',
            "name",
            tests="tests/train/test_run_folder.py",
        ),
    ),
    *changes(
        "camkd_fast/train/journal.py",
        f"tests/train/test_journal.py {CHECKPOINT}",
        Change(
            "what a record lacks is not named",
            "    def __missing__(",
            "    def missing(",
            tests="tests/train/test_journal.py",
        ),
        Change(
            "parts of a record are not",
            ", object_hook=partial(_ReadRecord, where=where))",
            ", object_pairs_hook=lambda p: dict(p))",
            tests="tests/train/test_journal.py",
        ),
        Change(
            "records of the resumed part twice",
            'if r["step"] <= step and r["kind"] != "test"',
            'if r["kind"] != "test"',
        ),
    ),
    *changes(
        "camkd_fast/train/config_file.py",
        "tests/train/test_config.py",
        Change("differences of the first config only", "for name in {**one, **two} if", "for name in one if"),
    ),
)
