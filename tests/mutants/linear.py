"""Wrong changes of the linear loss: camkd_fast/losses/linear*.py and projection.py."""

from . import Change, changes

ERRORS = "tests/losses/test_linear_arguments.py"
LOSS = (
    f"tests/losses/test_linear_rows.py tests/losses/test_linear_autograd.py {ERRORS} tests/losses/test_linear_loss.py"
)

CHANGES = (
    *changes(
        "camkd_fast/losses/linear_rows.py",
        LOSS,
        Change("rows of no teacher are lost", "if code >> k & 1) or (0,)", "if code >> k & 1)"),
        Change(
            "groups of given weights without their order", "order = codes.argsort(stable=True)", "order = codes * 0"
        ),
        Change("small groups at any cost", "max(n, SMALL_GROUP) * (3 + teachers)", "n * (3 + teachers)"),
        Change(
            "groups read from a device",
            "if weights is None or not may_read or count == 0:",
            "if weights is None or count == 0:",
        ),
        Change("as many valid rows as wanted", "if num_valid >= len(labels):", "if num_valid > 0:"),
        Change("valid rows last", "return (~kept).to(torch.uint8)", "return kept.to(torch.uint8)"),
        Change("the caller's limit is forgotten", "if most_rows is None:", "if True:"),
        Change("the last rows are cut off", "parts = -(-count // most_rows)", "parts = count // most_rows"),
    ),
    *changes(
        "camkd_fast/losses/linear_chunks.py",
        LOSS,
        Change("ignored rows let in reach the products", "if self.masks else None", "if False else None"),
        Change("biases of the whole head", "side.bias[: self.V]", "side.bias"),
        Change("gradients beyond the vocabulary", "total[written:] = 0.0", "pass"),
        Change(
            "gradients of left-out rows", "if self.rows is None else torch.zeros_like", "if True else torch.zeros_like"
        ),
        Change("every chunk is the first one", "        self.first = False", "        self.first = True"),
        Change(
            "gradients are those of the last rows",
            "total.hidden.index_copy_(0, rows, found)",
            "total.hidden[: len(found)] = found",
        ),
        Change(
            "the factors of single rows are those of the first",
            "_taken(factor, rows), student)",
            "factor[: len(student)], student)",
        ),
        Change(
            "given weights of the first rows",
            "weighting=weights[:, rows])",
            "weighting=weights[:, : len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start])",
        ),
        Change("scales of the first teachers", "tuple(scales[k] for k in teachers)", "scales[: len(teachers)]"),
        Change("softcaps of the first teachers", "tuple(softcaps[k] for k in teachers)", "softcaps[: len(teachers)]"),
        Change(
            "the weights of all teachers",
            "formula.weighting[list(teachers)] if len(teachers) < self.K else formula.weighting",
            "formula.weighting[: len(teachers)]",
        ),
        Change("teachers of weight 0 report a divergence", "per_teacher.masked_fill_(weights == 0, 0.0)", "pass"),
        Change(
            "statistics of the first teachers",
            "per_teacher = [PER_TEACHER + i * self.K + k for i in range(3) for k in teachers]",
            "per_teacher = [PER_TEACHER + i * self.K + k for i in range(3) for k in range(len(teachers))]",
        ),
        Change(
            "the gradient takes memory of its own",
            "            out=student,\n",
            "",
            tests=f"{LOSS} tests/losses/test_linear_memory.py",
        ),
        Change(
            "products under autocast",
            "with torch.autocast(stats.device.type, enabled=False):",
            "with torch.autocast(stats.device.type, torch.bfloat16):",
            tests=f"{LOSS} tests/losses/test_cpu_products.py",
        ),
    ),
    *changes(
        "camkd_fast/losses/projection.py",
        LOSS,
        Change("sums of the head's gradient begin with memory", "beta=0 if first else 1", "beta=1"),
        Change("the head's gradient is that of the last chunk", "beta=0 if first else 1", "beta=0"),
        Change(
            "by tiles, it is that of the last chunk",
            "total[columns].copy_(part) if first",
            "total[columns].copy_(part) if True",
        ),
        Change("rows get the gradient of the last tile", "total += part", "total = part"),
        Change("autocast rounds only the head", "rounded = hidden.to(self.products)", "rounded = hidden"),
        Change("the bias of the first tile", "part += self._bias[columns]", "part += self._bias[: part.shape[1]]"),
        Change(
            "a tile beyond the head", "min(begin + tile, C)", "begin + tile", equivalent="a slice ends with its tensor"
        ),
    ),
    *changes(
        "camkd_fast/losses/cpu_products.py",
        "tests/losses/test_cpu_products.py",
        Change("oneDNN takes a part of a wider matrix", "b = b.contiguous()", "pass"),
        Change("oneDNN takes empty matrices", " and a.numel() > 0", ""),
        Change("oneDNN rounds float64", "a.dtype == torch.float32 and ", ""),
        Change("oneDNN on every processor", ' and "AMD" in str(found.get("cpu_name"))', ""),
        Change("the second product is not transposed back", "_by_onednn(b.t(), a).t()", "_by_onednn(b.t(), a)"),
    ),
    *changes(
        "camkd_fast/losses/linear_op.py",
        LOSS,
        Change(
            "a graph for every number of rows",
            "call.labels.new_empty((count, call.labels.shape[0]),",
            "call.labels.new_empty((count, len(call.labels)),",
            tests="tests/losses/test_linear_autograd.py",
        ),
        Change(
            "a graph for every num_valid",
            "SymInt? num_valid",
            "int? num_valid",
            tests="tests/losses/test_linear_autograd.py",
        ),
        Change(
            "an incoming gradient is forgotten",
            "scale_rows(rows, factor.reshape(1), out)",
            "scale_rows(rows, torch.ones(1), out)",
        ),
        Change(
            "a retained graph is scaled in place",
            "gradient.dtype == dtype and not keeps_graph()",
            "gradient.dtype == dtype",
        ),
        Change(
            "parameters may change before backward",
            "save(ctx, *call.student(), *others)",
            "save(ctx, *(x if x is None else x.detach().clone() for x in call.student()), *others)",
        ),
        Change(
            "float16 is divided before it is scaled",
            "return not can_divide_in_kernel(self.product_dtype())",
            "return False",
            tests="tests/losses/test_linear_float16.py",
        ),
        Change(
            "a factor on the device is rounded with the gradient",
            "rows = gradient.reshape(gradient.shape[0], ",
            "return gradient * factor.to(dtype)\n        rows = gradient.reshape(gradient.shape[0], ",
            tests="tests/losses/test_linear_float16.py",
        ),
        Change("the loss without its factor", "* (number if on_device is None else on_device.reshape(()))", ""),
        Change(
            "labels are not checked",
            "checks.count_if_dense(of.labels, call.classes(), of.ignore_index)",
            "None",
            tests=f"{ERRORS}::test_errors_name_both_values",
        ),
    ),
    *changes(
        "camkd_fast/losses/linear.py",
        LOSS,
        Change(
            "a graph for every num_items",
            "if torch.compiler.is_compiling() and isinstance(num_items, (int, float)):",
            "if False:",
            tests="tests/losses/test_linear_autograd.py",
        ),
        Change(
            "one row has a dimension",
            "rows.detach().view((*rows.shape[:-1], *lead))",
            "rows.detach().view(*rows.shape[:-1], *lead)",
            tests="tests/losses/test_linear_loss.py",
        ),
        Change(
            "results of shifted labels keep the last position",
            "return rows[..., :-1] if shift else rows",
            "return rows",
        ),
        Change(
            "sums are means", 'return 1.0 if reduction == "sum" else None', 'return 0.5 if reduction == "sum" else None'
        ),
        Change(
            "the divisor is the number of rows",
            "return inverse_divisor(num_items, valid,",
            "return inverse_divisor(None, valid,",
        ),
        Change(
            "autocast is ignored",
            "return torch.get_autocast_dtype(hidden.device.type) if enabled else None",
            "return None",
        ),
        Change(
            "a trace keeps the number of labels",
            "if checks.can_count(labels) else None",
            "if labels.is_cpu else None",
            tests="tests/losses/test_linear_autograd.py",
        ),
        Change("the module forgets given weights", '{**self.settings, "weighting": weighting}', "self.settings"),
    ),
    *changes(
        "camkd_fast/losses/linear_checks.py",
        LOSS,
        Change("labels of the same position", "target[..., 1:], (0, 1)", "target[..., :-1], (0, 1)"),
        Change(
            "false of a mask counts",
            "torch.where(target, 0, formula.ignore_index)",
            "torch.where(target, formula.ignore_index, 0)",
        ),
        Change(
            "teachers' heads may be narrower", "if side.head.shape[0] < V:", "if i == 0 and side.head.shape[0] < V:"
        ),
        Change("teachers may require grad", 'checks.check_frozen(f"{model}\'s {field}", tensor)', "pass"),
        Change(
            "weights of shifted labels",
            "weighting = torch.nn.functional.pad(weighting, (0, 1))",
            "weighting = torch.nn.functional.pad(weighting, (1, 0))",
        ),
    ),
)
