"""Wrong changes of camkd_fast/models."""

from . import Change, changes

PAPER = "tests/models/test_architectures.py"
ZOO = "tests/models/test_zoo.py"
FROZEN = "tests/models/test_frozen.py"

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
            "hooked modules are folded",
            "return None if module._forward_hooks or module._forward_pre_hooks else module",
            "return module",
        ),
        Change("convolutions with two readers are folded", "and len(conv.users) == 1", ""),
        Change(
            "folded in float32",
            "fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype)",
            "fuse_conv_bn_eval(conv, norm).to(dtype)",
        ),
        Change("norms in half precision", "if isinstance(module, _NORMS) and dtype.itemsize < 4:", "if False:"),
        Change(
            "subclasses of Conv2d are folded",
            "type(called_once(conv)) is nn.Conv2d",
            "isinstance(called_once(conv), nn.Conv2d)",
        ),
    ),
)
