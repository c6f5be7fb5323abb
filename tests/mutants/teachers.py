"""Wrong changes of camkd_fast/train/teachers."""

from . import Change, changes

CACHE = "tests/train/test_teacher_cache.py"
WRITERS = "tests/train/test_cache_writers.py"
STREAMS = "tests/train/test_teacher_streams.py"
LIVE = "tests/train/test_live_teachers.py"
HASH = "tests/train/test_teacher_hash.py"
OPTIONS = "tests/train/test_options.py"
FITTED = "tests/train/test_fitted_teachers.py"

CHANGES = (
    *changes(
        "camkd_fast/train/teachers/cache_files.py",
        CACHE,
        Change(
            "fields of shards are not checked",
            "{name: shard[name] for name in SHARD}",
            "shard",
            tests="tests/train/test_teacher_cache.py",
        ),
        Change("augmentation is not part of the key", "augmentation=str(config.augmentation),", 'augmentation="",'),
        Change("seed of the images instead of the views", "seed=config.augmentation_seed,", "seed=config.seed,"),
        Change("split is not part of the key", "split=split,", 'split="train",'),
        Change("loader is not part of the key", "loader=loader,", 'loader="resident",'),
        Change("autocast is not part of the key", "autocast=str(teachers.autocast),", 'autocast="None",'),
        Change("normalisation is not part of the key", "mean=tuple(data.mean),", "mean=(),"),
        Change(
            "temperature is not compared",
            'if storage.top_k is None:\n        del settings["temperature"]',
            'del settings["temperature"]',
        ),
        Change("shards are not verified", 'if digest != shard["sha256"]:', "if False:"),
    ),
    *changes(
        "camkd_fast/train/teachers/cache.py",
        CACHE,
        Change("rows of view 0", "rows = view * N + index", "rows = index"),
        Change(
            "an incomplete cache opens",
            "if total - there > unreadable * key.views:",
            "if False:",
            tests=f"{CACHE} {WRITERS}",
        ),
        Change(
            "unreadable images per cache instead of per view", "unreadable * key.views", "unreadable", tests=WRITERS
        ),
        Change("number of heads is not checked", "if len(heads) != K:", "if False:"),
    ),
    *changes(
        "camkd_fast/train/teachers/cache_writer.py",
        f"{CACHE} {WRITERS}",
        Change("rows written twice", "new = ~covered[rows]", "new = torch.ones_like(rows, dtype=torch.bool)"),
        Change("view of the batch is not checked", "if batch.view != view:", "if False:"),
        Change("all ranks write one file", 'f"manifest.{rank:03d}.json"', '"manifest.000.json"'),
        Change(
            "features in float32 whatever the dtype",
            'kept["features"] = features.to(DTYPES[self._storage.dtype])',
            'kept["features"] = features',
        ),
        Change(
            "maximum instead of the average",
            "features.float().mean((2, 3)).cpu()",
            "features.float().amax((2, 3)).cpu()",
        ),
    ),
    *changes(
        "camkd_fast/train/teachers/truncation.py",
        "tests/train/test_truncation.py",
        Change("bucket at T = 1", "(rest / temperature).logsumexp(-1)", "rest.logsumexp(-1)"),
        Change("mass of the rest not shared", "- math.log(C - k))", "- math.log(C))"),
        Change("int16 ids up to 65535", "C <= 32767", "C <= 65535"),
    ),
    *changes(
        "camkd_fast/train/teachers/live.py",
        LIVE,
        Change(
            "teachers in training mode",
            "model.eval().requires_grad_(False) for model",
            "model.requires_grad_(False) for model",
            tests=f"{LIVE} {CACHE}",
        ),
        Change("images keep their dtype", "else images.to(self._dtypes[k]))", "else images)"),
        Change("teachers wait for each other", "stream.wait_event(start)", "stream.wait_stream(here)", tests=STREAMS),
        Change("the step does not wait for the teachers", "here.wait_stream(stream)", "pass", tests=STREAMS),
        Change(
            "heads follow autocast",
            "with torch.autocast(features.device.type, enabled=False):",
            "if True:",
            tests=f"{LIVE} tests/train/test_feature_strategies.py",
        ),
    ),
    *changes(
        "camkd_fast/train/teachers/teacher_hash.py",
        HASH,
        Change("hash without the values", "digest.update(data)", "pass", tests=LIVE),
        Change("attributes do not count", 'settings.update(f"{name}.{key}={text};".encode())', "pass"),
        Change("code does not count", "digest.update(inspect.getsource(thing).encode())", "pass"),
        Change("numbers of files do not count", "elif not isinstance(value, str) and value is not None", "elif False"),
        Change("code of packages counts", "_INSTALLED.isdisjoint(Path(file).parts)", "True"),
        Change("earlier caches of own code fit", " and not here.endswith(_OWN)", ""),
    ),
    *changes(
        "camkd_fast/train/teachers/runs.py",
        OPTIONS,
        Change(
            "cache dtype dropped",
            "Storage(config.cache_dtype, config.cache_top_k",
            'Storage("float32", config.cache_top_k',
        ),
        Change("top_k dropped", "Storage(config.cache_dtype, config.cache_top_k", "Storage(config.cache_dtype, None"),
        Change(
            "teachers in float32",
            'dtype = None if config.precision.dtype == "float32" else DTYPES[config.precision.dtype]',
            "dtype = None",
        ),
        Change("teachers are not frozen in channels_last", "dtype, config.precision.channels_last)", "dtype, False)"),
        Change(
            "a teacher without a map passes",
            "if isinstance(source.model, LogitsOnly):",
            "if False:",
            tests=FITTED,
        ),
        Change(
            "unknown statistics pass in silence",
            "[name for name, (source, _) in found.items() if source.mean is None]",
            "[]",
            tests=FITTED,
        ),
        Change(
            "the class map is not read",
            "None if config.class_map is None else ClassMap.read(config.class_map, config.teachers)",
            "None",
        ),
    ),
    *changes(
        "camkd_fast/train/teachers/fitted.py",
        FITTED,
        Change("levels are taken for units", "tuple(level / 255 for level in levels)", "tuple(levels)"),
        Change(
            "the teacher's preprocessing is dropped",
            "return Fitted(adapted(model, own, given),",
            "return Fitted(model,",
        ),
        Change("names beat the class map", "if class_map is not None:\n", "if False:\n"),
        Change("counts are not compared", "if count != images.num_classes:", "if False:", tests=OPTIONS),
    ),
    *changes(
        "camkd_fast/train/class_map.py",
        "tests/train/test_class_map.py",
        Change("a class twice", "if position in order:", "if False:"),
        Change("a missing class", "if missing:", "if False:"),
        Change("a teacher's class twice", "!= position:\n                both", "is None:\n                both"),
        Change("numbers beat names", "        if found:\n            return found[0]\n", ""),
        Change(
            "other teachers pass",
            "if unknown := [name for name in given if name not in teachers]:",
            "if unknown := []:",
        ),
    ),
    *changes(
        "camkd_fast/train/yaml_file.py",
        "tests/train/test_class_map.py",
        Change("a key twice in YAML", "if key in found:", "if False:"),
    ),
)
