"""Wrong changes of camkd_fast/models."""

from . import Change, changes

PAPER = "tests/models/test_architectures.py"
ZOO = "tests/models/test_zoo.py"
FROZEN = "tests/models/test_frozen.py"
REP_DISTILLER = "tests/models/test_rep_distiller.py"
FILES = "tests/models/test_checkpoint_files.py"
SPLIT = "tests/models/test_split.py"
SOURCES = "tests/models/test_sources.py tests/models/test_source_packages.py"

CHANGES = (
    *changes(
        "camkd_fast/models/resnet.py",
        PAPER,
        Change(
            "no ReLU after the sum",
            "return F.relu(self.residual(x) + self.shortcut(x), inplace=True)",
            "return self.residual(x) + self.shortcut(x)",
        ),
        Change(
            "stride of the first stage", "stride=2 if stage > 0 and block == 0 else 1", "stride=2 if block == 0 else 1"
        ),
        Change(
            "shortcut with a ReLU",
            "self.shortcut = conv_norm(in_channels, channels, 1, stride)",
            "self.shortcut = conv_norm_relu(in_channels, channels, 1, stride)",
        ),
    ),
    *changes(
        "camkd_fast/models/wide_resnet.py",
        PAPER,
        Change("raw input into the convolution of the shortcut", "self.shortcut(active))", "self.shortcut(x))"),
        Change(
            "no ReLU after the last norm",
            "layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]",
            "layers += [nn.BatchNorm2d(channels)]",
        ),
        Change(
            "stride in the second convolution",
            "self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))",
            "self.conv2(self.bn2(self.conv1(active)))",
        ),
    ),
    *changes(
        "camkd_fast/models/vgg.py",
        PAPER,
        Change(
            "average instead of maximum",
            "return F.max_pool2d(x, 2) if",
            "return F.avg_pool2d(x, 2) if",
            tests=f"{PAPER} {ZOO}::test_shapes_and_protocol",
        ),
        Change(
            "pooling after the first block",
            "layers.append(LargeMapPool() if block == 4 else nn.MaxPool2d(2))",
            "layers.append(LargeMapPool() if block == 4 else nn.MaxPool2d(2, ceil_mode=True))",
            tests=f"{ZOO}::test_shapes_and_protocol",
        ),
    ),
    *changes(
        "camkd_fast/models/mobilenet.py",
        PAPER,
        Change(
            "a ReLU on the linear projection", "conv_norm(hidden, channels, 1),", "conv_norm_relu(hidden, channels, 1),"
        ),
        Change(
            "no shortcut", "self.has_shortcut = stride == 1 and in_channels == channels", "self.has_shortcut = False"
        ),
        Change("stride in every block", "stride = stage.stride if block == 0 else 1", "stride = stage.stride"),
    ),
    *changes(
        "camkd_fast/models/shufflenet.py",
        PAPER,
        Change("no shuffle in V1", "ChannelShuffle(groups) if groups > 1 else nn.Identity()", "nn.Identity()"),
        Change(
            "no shuffle in V2",
            "self.shuffle(torch.cat([kept, self.branch(convolved)], 1))",
            "torch.cat([kept, self.branch(convolved)], 1)",
        ),
        Change("halves exchanged", "kept, convolved = x.chunk(2, 1)", "convolved, kept = x.chunk(2, 1)"),
        Change(
            "maximum instead of average", "nn.AvgPool2d(3, stride=2, padding=1)", "nn.MaxPool2d(3, stride=2, padding=1)"
        ),
        Change(
            "shuffle of the other memory format",
            "torch.unflatten(pixels, 3, (self.groups, -1)).transpose(3, 4)",
            "torch.unflatten(pixels, 3, (-1, self.groups)).transpose(3, 4)",
            tests=f"{ZOO}::test_channels_last_is_kept_and_agrees",
        ),
    ),
    *changes(
        "camkd_fast/models/blocks.py",
        f"{PAPER} {ZOO}",
        Change(
            "sum instead of mean in the head",
            "self.fc(features.mean((2, 3)))",
            "self.fc(features.sum((2, 3)))",
            tests=PAPER,
        ),
        Change(
            "initialisation by fan-in",
            'mode="fan_out"',
            'mode="fan_in"',
            tests=f"{ZOO}::test_initial_weights_have_the_published_spread",
        ),
        Change(
            "classifier of VGG as wide as any",
            "nn.init.normal_(model.fc.weight, std=0.01)",
            "nn.init.normal_(model.fc.weight, std=0.1)",
            tests=f"{ZOO}::test_initial_weights_have_the_published_spread",
        ),
    ),
    *changes(
        "camkd_fast/models/frozen.py",
        FROZEN,
        Change(
            "modules work in place",
            "            module.inplace = False",
            "            pass",
            tests="tests/train/test_distiller_maps.py",
        ),
        Change(
            "hooked modules are folded",
            "hooked = module._forward_hooks or module._forward_pre_hooks",
            "hooked = False",
        ),
        Change("shared parameters are folded", "if count > 1}", "if count > 9}"),
        Change("convolutions with two readers are folded", "and len(conv.users) == 1", ""),
        Change(
            "folded in float32",
            "fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype)",
            "fuse_conv_bn_eval(conv, norm).to(dtype)",
        ),
        Change("norms in half precision", "if isinstance(module, _BatchNorm) and dtype.itemsize < 4:", "if False:"),
        Change(
            "subclasses of Conv2d are folded",
            "type(called_once(conv)) is nn.Conv2d",
            "isinstance(called_once(conv), nn.Conv2d)",
        ),
    ),
    *changes(
        "camkd_fast/models/rep_distiller.py",
        REP_DISTILLER,
        Change(
            "branches of V2 exchanged",
            '_pairs("short.0", "short.1", "branch.0", "branch.1", "branch.2")',
            '_pairs("branch.0", "branch.1", "short.0", "short.1", "branch.2")',
        ),
        Change("units of a stage in reverse", "for index in range(units):", "for index in reversed(range(units)):"),
        Change("pooling layers of VGG not counted", "position += block > 0", "position += 0"),
        Change(
            "our own names are not read",
            "if set(tensors) <= set(names.values()):",
            "if False:",
        ),
    ),
    *changes(
        "camkd_fast/models/weights.py",
        REP_DISTILLER,
        Change("any counter may be missing", "and not key.endswith(_COUNTER)", "and not key.endswith('running_var')"),
        Change("missing tensors are accepted", "key not in tensors and", "False and"),
        Change("extra tensors are accepted", "if key not in names]", "if False]"),
        Change("eleven names are listed", "_LISTED = 10", "_LISTED = 11"),
        Change("stays in training mode", "return model.eval()", "return model"),
    ),
    *changes(
        "camkd_fast/models/checkpoint_files.py",
        FILES,
        Change("any pickle is opened", "weights_only=True)\n    except", "weights_only=False)\n    except"),
        Change(
            "stand-ins stay allowed",
            "with torch.serialization.safe_globals(_STAND_INS):",
            "if torch.serialization.add_safe_globals(_STAND_INS) is None:",
        ),
        Change("scalars of any type", "if dtype.str[1:] not in _SCALARS or", "if"),
        Change(
            "byte order of scalars",
            "self.str = state[1] + self.str[1:]",
            "pass",
            tests=f"{FILES}::test_big_endian_scalars",
        ),
        Change("one prefix only", "for _ in _PREFIXES:  # in any order", "for _ in range(1):"),
        Change(
            "prefix of some names",
            "if names and all(name.startswith(prefix) for name in names):",
            "if names and any(name.startswith(prefix) for name in names):",
        ),
        Change("every count is left out", "if (prefix, name) != (_MODULE, _AVERAGED)]", "if name != _AVERAGED]"),
        Change("parameters keep their gradients", "name: tensor.detach() for", "name: tensor for"),
        Change("TorchScript is opened", 'if "constants.pkl" in members:', "if False:"),
    ),
    *changes(
        "camkd_fast/models/split.py",
        SPLIT,
        Change("annotations are kept", "copies[node].type = None", "pass", tests="tests/train/test_distiller.py"),
        Change(
            "functions work in place",
            'node.update_kwarg("inplace", False)',
            "pass",
        ),
        Change(
            "other paths from the images are kept",
            'if any(other.op == "placeholder" for other in needed):',
            "if False:",
        ),
        Change("modules called twice", "if len(calls) != 1:", "if len(calls) < 1:"),
        Change("everything is traced", 'return not self.layer.startswith(f"{module_qualified_name}.")', "return False"),
        Change("maps of any shape", "or maps.dim() != 4:", "or maps.dim() < 2:"),
        Change(
            "number of features",
            "return Split(features, head, maps.shape[1],",
            "return Split(features, head, maps.shape[2],",
        ),
    ),
    *changes(
        "camkd_fast/models/sources.py",
        SOURCES,
        Change("levels of runs are not divided", "tuple(level / 255 for level", "tuple(level for level"),
        Change("random numbers are drawn", "with torch.random.fork_rng(devices=[]):", "if True:"),
        Change(
            "existing paths are taken to pieces",
            'while not Path(rest.partition("@")[2] or rest).exists():',
            "while True:",
        ),
        Change(
            "mean and std of a source are not checked",
            'Preprocessing(options.get("mean"), options.get("std"), options.get("size"))',
            "pass",
        ),
        Change("another number of classes", "known is not None and known != num_classes:", "False:"),
        Change(
            "errors of the caller's function", "except (Exception, SystemExit) as error:", "except OSError as error:"
        ),
        Change(
            "errors of the caller's attributes", "except (TypeError, ValueError) as error:", "except OSError as error:"
        ),
        Change("the current folder stays on the path", "        sys.path.remove(here)", "        pass"),
        Change(
            "buffers are preparation", "if isinstance(value, (int, float, str, tuple, list)):", "if value is not None:"
        ),
    ),
    *changes(
        "camkd_fast/models/torchvision_models.py",
        SOURCES,
        Change(
            "the file may run code", 'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'
        ),
        Change("classes of a file by its first tensor", "depending[-1], 0)", "next(iter(tensors)), 0)"),
    ),
    *changes(
        "camkd_fast/models/hf_models.py",
        SOURCES,
        Change(
            "code of the hub",
            "AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False)",
            "AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)",
        ),
        Change("placeholders are names", "known = None if any(", "known = None if all("),
        Change(
            "crop without do_center_crop",
            'getattr(processor, "do_center_crop", False) and processor.crop_size',
            'getattr(processor, "crop_size", None)',
        ),
        Change("offset of levels", "(value + offset) / factor", "value / factor"),
        Change("EfficientNet divides once", "repeats = 2 if", "repeats = 1 if"),
    ),
    *changes(
        "camkd_fast/models/timm_models.py",
        SOURCES,
        Change("the head keeps its classes", 'if f"{head}.weight" in tensors:', "if False:"),
        Change(
            "names for a file",
            "config, classes = model.pretrained_cfg, None",
            "config, classes = model.pretrained_cfg, _imagenet(timm, model)",
        ),
    ),
    *changes(
        "camkd_fast/models/preprocessing.py",
        "tests/models/test_preprocessing.py",
        Change("mean of one length, std of another", "if len(self.mean) != len(self.std):", "if False:"),
        Change(
            "a size of 0",
            "if self.size is not None and min(self.size) < 1:",
            "if False:",
            tests="tests/models/test_sources.py",
        ),
        Change("scale the other way round", "return s / S, (m - M) / S", "return S / s, (m - M) / S"),
        Change("shift in the student's units", "return s / S, (m - M) / S", "return s / S, (m - M) / s"),
        Change("no antialias", 'mode="bilinear", antialias=True)', 'mode="bilinear")'),
        Change(
            "images are rounded first",
            "        if grows:\n            x = self._normalised(x)",
            "        x = x.to(self.dtype)",
        ),
        Change("the affine follows a cast", "setattr(self, name, exact.to(moved.device).view_as(moved))", "pass"),
        Change("size is not part of the hash", 'return f"size={self.size}, channels={self.channels}"', 'return ""'),
        Change("channels are not compared", "if (given.channels, channels) != (1, 3):", "if False:"),
        Change(
            "the affine of the larger image",
            "x.shape[-2] * x.shape[-1] < math.prod(self.size or ())",
            "x.shape[-2] * x.shape[-1] > math.prod(self.size or ())",
            equivalent="resize and affine commute: only the time changes",
        ),
    ),
    *changes(
        "camkd_fast/models/imagenet_names.py",
        "tests/models/test_imagenet_names.py",
        Change("no order is known", "if equal >= _IN_ORDER * len(ids):", "if False:"),
        Change("the larger set only", '("imagenet-1k", "imagenet-22k")', '("imagenet-22k",)'),
        Change("the first of several classes", "and len(meant) == 1:", "and meant:"),
    ),
)
