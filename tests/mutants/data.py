"""Wrong changes of camkd_fast/data."""

from . import Change, changes

AUGMENT = "tests/data/test_augment.py"
PIXELS = "tests/data/test_loader_pixels.py"
RAND = "tests/data/test_rand_augment.py"
ERASING = "tests/data/test_erasing.py"
LOADERS = "tests/data/test_loaders.py"
POSITION = "tests/data/test_loader_position.py"
ORDER = "tests/data/test_order.py"
SETS = "tests/data/test_data_sets.py"
DEMO = "tests/experiments/test_demo.py"
LABELS = (
    f"{DEMO}::test_split_is_disjoint_stratified_and_repeatable {DEMO}::test_smaller_parts_are_nested_and_excess_is_refused"
    f" {DEMO}::test_swapped_classes_change_places_and_nothing_else {DEMO}::test_corrupted_labels_are_any_other_class"
    f" {DEMO}::test_corrupted_labels_are_wrong_in_exactly_that_share"
)

CHANGES = (
    *changes(
        "camkd_fast/data/rand_augment.py",
        RAND,
        Change(
            "the order of the batch is lost",
            "torch.from_numpy(np.argsort(place)).to(levels.device",
            "torch.from_numpy(np.arange(len(place))).to(levels.device",
        ),
        Change("operations of other images", "place = place[order]", "pass"),
        Change(
            "the caller's levels change",
            "levels = levels.index_select(0, torch.from_numpy(order).to(levels.device, non_blocking=True))",
            "levels.copy_(levels[torch.from_numpy(order)])",
        ),
        Change("the view is not in the key", "key(_RAND_AUGMENT, seed, view)", "key(_RAND_AUGMENT, seed)"),
        Change("pixels wrap around", "found * inside[:, None]", "found"),
        Change(
            "pixel corners",
            "device=levels.device) + 0.5 for side in (W, H))",
            "device=levels.device) for side in (W, H))",
        ),
        Change("a border of the mean", "inner.copy_(((9", "inner.clone().copy_(((9"),
        Change("bits of the largest magnitude", "dropped = round(4 * strength)", "dropped = 4"),
        Change("equalised by steps of one level less", "step // 2)", "0)"),
    ),
    *changes(
        "camkd_fast/data/erasing.py",
        ERASING,
        Change("boxes in every image", "uniform[:, 0] < probability", "uniform[:, 0] < 1"),
        Change("boxes never reach the edge", "- sides + 1))", "- sides))"),
        Change("one row too many", "(rows < bottom)", "(rows <= bottom)"),
        Change("one stream with RandAugment's", "_ERASING = 4", "_ERASING = 3"),
    ),
    *changes(
        "camkd_fast/data/epoch_loader.py",
        ERASING,
        Change("boxes of the first view", "boxes(a.erasing, seed, view,", "boxes(a.erasing, seed, 0,"),
        Change("operations of the first view", "draws(rounds, seed, view,", "draws(rounds, seed, 0,"),
        Change("a recorded step finishes what differs by sample", "a is not None and a.of_levels", "False"),
    ),
    *changes(
        "camkd_fast/data/augment.py",
        AUGMENT,
        Change(
            "shifts never reach the last one",
            "offsets = 2 * augmentation.padding + 1",
            "offsets = 2 * augmentation.padding",
            tests=f"{AUGMENT} {PIXELS}::test_shifts_and_flips_are_uniform_in_the_pixels",
        ),
        Change(
            "windows never reach the edge",
            "np.floor(position * (sizes - window + 1))",
            "np.floor(position * (sizes - window))",
        ),
        Change("flip ignored", "mirrored = (draws[:, 0] < 0.5) & augmentation.flip", "mirrored = draws[:, 0] < 0.5"),
        Change(
            "one number for row and column",
            "position, area, ratio = draws[:, :2],",
            "position, area, ratio = draws[:, [0, 0]],",
        ),
        Change("area of the default scale", "low, high = augmentation.scale", "low, high = 0.08, 1.0"),
        Change(
            "ratio not logarithmic",
            "ratio = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * ratio)",
            "ratio = narrow + (wide - narrow) * ratio",
        ),
        Change(
            "height and width exchanged",
            "np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))",
            "np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))",
        ),
        Change("windows that just fit are refused", "(tried <= np.stack([H, W]))", "(tried < np.stack([H, W]))"),
        Change("view is not in the key", "key(_AUGMENTATION, seed, view)", "key(_AUGMENTATION, seed)", tests=AUGMENT),
        Change(
            "the last window that fits",
            "first = fits.argmax(1)",
            "first = _TRIES - 1 - fits[:, ::-1].argmax(1)",
        ),
    ),
    *changes(
        "camkd_fast/data/order.py",
        f"{ORDER} {LOADERS}",
        Change(
            "order without the epoch",
            "hashes(key(_ORDER, seed, epoch), np.arange(N))",
            "hashes(key(_ORDER, seed), np.arange(N))",
        ),
        Change("a last step of one image per rank", "0 < rest < 2 * world", "0 < rest < world"),
        Change("the last incomplete step is dropped", "+ [rest] * (rest > 0)", ""),
        Change("evaluation is shuffled", "if shuffle else np.arange(N)", "if True else np.arange(N)"),
    ),
    *changes(
        "camkd_fast/data/epoch_loader.py",
        f"{LOADERS} {POSITION}",
        Change(
            "position after the yield",
            "                if len(index):\n                    yield Batch(pixels, labels, index, view, self._finish)",
            "                self._position -= 1\n                if len(index):\n"
            "                    yield Batch(pixels, labels, index, view, self._finish)\n                self._position += 1",
        ),
        Change(
            "labels in the order of the set",
            "yield Batch(pixels, labels, index",
            "yield Batch(pixels, labels.sort().values, index",
        ),
        Change(
            "labels of unreadable files",
            "(labels,) = self._labels_of([index])",
            "labels = labels[: len(index)]",
            tests="tests/data/test_unreadable_files.py",
        ),
        Change("position of the epoch before", "self._epoch, self._position = epoch, 0", "self._epoch = epoch"),
        Change("view of the epoch", "view = c.view(self._epoch)", "view = self._epoch"),
        Change(
            "normalised by the first channel",
            "for v in (mean, factor))\n        self._mean",
            "for v in (mean[:1].expand(mean.shape), factor))\n        self._mean",
            tests=PIXELS,
        ),
        Change("augmentation seed is not compared", '"augmentation seed": c.augmentation_seed,', ""),
        Change("global batch of this rank", '"global batch": c.batch_size * c.world', '"global batch": c.batch_size'),
        Change(
            "one bad file more than allowed",
            "if len(self._bad) >= allowed:",
            "if len(self._bad) > allowed:",
            tests="tests/data/test_unreadable_files.py",
        ),
        Change(
            "bad files forgotten on resume",
            '{*state["bad"], *self.config.known_bad}',
            "{*self.config.known_bad}",
            tests=f"{LOADERS}::test_a_position_holds_the_unreadable_files",
        ),
    ),
    *changes(
        "camkd_fast/data/batch.py",
        f"{LOADERS} {POSITION}",
        Change(
            "view seed ignored", "return self.seed if self.view_seed is None else self.view_seed", "return self.seed"
        ),
        Change("views without end", "return epoch if self.views is None else epoch % self.views", "return epoch"),
        Change("rank of the world", "if self.rank >= self.world:", "if self.rank > self.world:"),
    ),
    *changes(
        "camkd_fast/data/resident.py",
        PIXELS,
        Change(
            "mirrored images shifted by one",
            "left = left + record.mirrored * (self.W - 1)",
            "left = left + record.mirrored * self.W",
        ),
        Change("levels are cut instead of rounded", "align_corners=True).round_()", "align_corners=True)"),
        Change(
            "windows read outside", "torch.minimum(within.clamp(min=0), length[:, None] - 1)", "within.clamp(min=0)"
        ),
        Change(
            "rows and columns exchanged",
            "rows = self._positions(self.axes[0], top, height)",
            "rows = self._positions(self.axes[0], left, height)",
        ),
    ),
    *changes(
        "camkd_fast/data/torch_loader.py",
        f"{PIXELS} tests/data/test_dali.py",
        Change(
            "seed of the order",
            "self.config.augmentation_seed, view, np.array([sample]), size)",
            "self.config.seed, view, np.array([sample]), size)",
            tests=f"{LOADERS}::test_views_of_files_have_their_own_seed_too",
        ),
        Change("files are never mirrored", "levels[:, ::-1].copy() if record.mirrored[0] else ", ""),
        Change("files are never shifted", "if record.shifts.any():", "if False:"),
    ),
    *changes(
        "camkd_fast/data/decode.py",
        "tests/data/test_dali.py tests/data/test_unreadable_files.py",
        Change("no antialiasing", "Image.Resampling.BILINEAR", "Image.Resampling.NEAREST"),
        Change("16 bits are cut", "np.rint(np.asarray(image) / 257)", "np.rint(np.asarray(image) / 256)"),
        Change("one pixel of context", "reach = math.ceil(max(height, width, size) / size)", "reach = 0"),
    ),
    *changes(
        "camkd_fast/data/images.py",
        f"{SETS} {LABELS}",
        Change(
            "label C is valid", "((labels < 0) | (labels >= num_classes))", "((labels < 0) | (labels > num_classes))"
        ),
        Change("right labels among the wrong ones", "torch.randint(1, num_classes,", "torch.randint(0, num_classes,"),
        Change(
            "one class is copied, not swapped",
            "swapped[labels == one], swapped[labels == other] = other, one",
            "swapped[labels == one] = other",
        ),
        Change(
            "labels are not in the fingerprint",
            "for tensor in (self.pixels, self.labels):",
            "for tensor in (self.pixels,):",
        ),
        Change(
            "images not in the centre of the border", "top, left = (side - H) // 2, (side - W) // 2", "top, left = 0, 0"
        ),
        Change(
            "split without the seed",
            "torch.randperm(labels.numel(), generator=generator)\n    position",
            "torch.randperm(labels.numel(), generator=torch.Generator())\n    position",
        ),
    ),
    *changes(
        "camkd_fast/data/splits.py",
        SETS,
        Change(
            "validation images are trained on",
            "return images.take(kept.sort().values), images.take",
            "return images, images.take",
        ),
        Change(
            "a small fraction holds nothing out",
            "held = max(1, round(fraction * len(images))) if fraction else 0",
            "held = round(fraction * len(images))",
        ),
    ),
    *changes(
        "camkd_fast/data/folders.py",
        "tests/data/test_image_folders.py",
        Change("test images of a flat tree by the seed", "TEST_FRACTION, seed=0)", "TEST_FRACTION, seed=split_seed)"),
        Change(
            "val is the test split though test exists",
            "return Splits(train, *others) if len(others) == 2",
            "return Splits(train, *others[::-1]) if len(others) == 2",
        ),
    ),
    *changes(
        "camkd_fast/data/walk.py",
        "tests/data/test_walk.py",
        Change("hidden folders must be readable", ", strict=False)", ")"),
    ),
    *changes(
        "camkd_fast/data/cifar.py",
        "tests/data/test_cifar.py",
        Change(
            "columns before channels",
            "return pixels.reshape(-1, 3, 32, 32), labels",
            "return pixels.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2), labels",
        ),
        Change(
            "a global is imported",
            "if (module, name) not in STAND_INS:",
            "if (module, name) not in STAND_INS and module == 'os':",
        ),
    ),
    *changes(
        "camkd_fast/data/catalogue.py",
        SETS,
        Change(
            "default validation fraction",
            "Splits(*hold_out(train, validation, split_seed), test)\n    side",
            "Splits(*hold_out(train, 0.1, split_seed), test)\n    side",
        ),
        Change(
            "default split seed",
            "Splits(*hold_out(train, validation, split_seed), test)\n    side",
            "Splits(*hold_out(train, validation, 0), test)\n    side",
            tests="tests/data/test_cifar.py",
        ),
    ),
)
