"""Wrong changes of the row op of shards, and of what processes that share a vocabulary exchange."""

from . import Change, changes

SHARDS = "tests/backends/test_row_shards.py"
ROWS = (  # the quick ones first
    f"{SHARDS}::test_masked_shards {SHARDS}::test_labels_of_no_shard {SHARDS}::test_entropies_of_the_student"
    f" {SHARDS}::test_a_label_in_several_shards_is_no_label {SHARDS}::test_gradient_in_place_and_its_scale"
    f" {SHARDS}::test_any_shards {SHARDS}::test_every_divergence_weighting_and_temperature"
)
CUDA = "tests/cuda/test_row_shards_on_host.py"
LINEAR = "tests/losses/test_linear_vocabulary.py"

CHANGES = (
    *changes(
        "camkd_fast/backends/row_sums.py",
        ROWS,
        Change("sums of parts as they are", "drop = (top - _finite(whole)).masked_fill(empty, 0.0)", "drop = top * 0"),
        Change(
            "an empty part counts",
            "((drop / t).exp().masked_fill(empty, 0.0) for",
            "((drop / t).exp() * 1.0 for",
            equivalent="its sums are 0",
        ),
        Change(
            "the change of the student's maximum only", "drop[:, of_teachers] - drop[:, of_student]", "-drop[:, :1]"
        ),
        Change(
            "of the reverse KL by the teacher's factor",
            "by, base, change = factorT[:, of_student], sumT[:, of_student], ",
            "by, base, change = factorT[:, of_teachers], sumT[:, of_student], ",
        ),
        Change("a vanished part times infinity", "factor * sums.masked_fill(factor == 0, 0.0)", "factor * sums"),
        Change(
            "teachers' entropies at T", "_scaled(factor1, plogp + sum1 * drop)", "_scaled(factorT, plogp + sumT * drop)"
        ),
        Change(
            "the student's entropy at 1",
            "_scaled(factorT, plogp + sumT * drop)",
            "_scaled(factor1, plogp + sum1 * drop)",
        ),
        Change("the label's distance from the part's maximum", "(label + drop).masked_fill", "label.masked_fill"),
        Change("labels of several parts", "at_label.masked_fill(owners != 1, torch.nan)", "at_label"),
        Change("labels of no part are that of the maximum", "owners != 1, torch.nan", "owners > 1, torch.nan"),
        Change("columns of probability 0 count", "(e * x.masked_fill(e == 0, 0.0)).sum(-1)", "(e * x).sum(-1)"),
        Change("every row has its label here", ".masked_fill(~here, torch.nan)", ""),
        Change("the label's column of every row", "here.to(p.dtype).unsqueeze(-1))", "torch.ones_like(p))"),
        Change("ignored rows have a gradient", ".masked_fill(ignored.unsqueeze(-1), 0.0)", ""),
        Change("rows of invalid labels have a gradient", ".masked_fill(~valid.unsqueeze(-1), torch.nan)", ""),
        Change("an infinite reverse KL", "centers = centers.masked_fill(centers.isinf(), torch.nan)", "pass"),
        Change("without the factor", "gradient) * grad_scale", "gradient)"),
    ),
    *changes(
        "csrc/cpu/row_passes.h",
        ROWS,
        Change(
            "results of the sums over these columns",
            "if (args.shard != Shard::sums) return rows.read_sums(args, index, lane);",
            "",
        ),
        Change(
            "a pass over mixtures before their rows are known",
            "if (!is_mixture(args.formula) || args.shard == Shard::sums) return;",
            "if (!is_mixture(args.formula)) return;",
            equivalent="slower: the next step replaces what it writes",
        ),
        Change(
            "results of the mixtures of these columns",
            "if (args.shard == Shard::results) return;  // those of the whole row are given",
            "",
        ),
        Change(
            "no finite logit at the label's shard",
            "if (stream.max[lane] == -INFINITY) stream.label[lane] = logit(k, labels.first);",
            "",
        ),
    ),
    *changes(
        "csrc/cpu/row_lanes.h",
        ROWS,
        Change(
            "labels that are elsewhere are invalid",
            "std::isnan(streams[0].label[lane]) ? NAN : 0.0f",
            "label_nan[lane]",
        ),
        Change("labels that nobody has are valid", "std::isnan(streams[0].label[lane]) ? NAN : 0.0f", "0.0f"),
        Change(
            "no centers",
            "for (int i = 0; i < kRowSums; ++i) numbers(k, i)[lane]",
            "for (int i = 0; i < kRowSums - 1; ++i) numbers(k, i)[lane]",
        ),
    ),
    *changes(
        "csrc/cuda/any_formula/kernel.cuh",
        CUDA,
        Change(
            "sums where they are given",
            "if (args.shard == Shard::none || args.shard == Shard::sums) {",
            "if (args.shard != Shard::mixtures) {",
        ),
        Change(
            "mixtures where their sums are given",
            "(args.shard == Shard::none || args.shard == Shard::mixtures)",
            "args.shard != Shard::sums",
        ),
        Change("results are written with the sums", "write_sums(n);\n            return;", "write_sums(n);"),
        Change(
            "CUDA: labels that are elsewhere are invalid",
            "args.shard == Shard::none ? labels.valid : !std::isnan(numbers.sums[0].label)",
            "labels.valid",
        ),
        Change(
            "assertions on labels of shards", "if (launch_.debug && args.shard == Shard::none)", "if (launch_.debug)"
        ),
        Change("probabilities of the row before", "row().numbers.inverse[k] = 1.0f / row().numbers.sums[k].sumT;", ""),
        Change(
            "ignored rows leave their sums",
            "for (int i = 0; i < kRowSums; ++i) sum_of(args, group_.member, i, n) = 0;",
            "{}",
            equivalent="nobody reads them",
        ),
    ),
    *changes(
        "csrc/cuda/row_loss/row_loss.cu",
        CUDA,
        Change("shards of the paper's formula are whole rows", "args.shard != Shard::none || !is_basic", "!is_basic"),
    ),
    *changes(
        "camkd_fast/kernels/row_shards.py",
        ROWS,
        Change(
            "Triton: labels that are elsewhere are invalid",
            "valid = s_label == s_label",
            "valid = (labels[0] >= 0) & (labels[0] < C)",
        ),
        Change("Triton: labels that nobody has are valid", "valid = s_label == s_label", "valid = kept"),
        Change(
            "the center of a mixture is its divergence",
            "centers += (tl.load(at(sums, k + 1, CENTER, N, n)),)",
            "centers += (cross,)",
        ),
        Change(
            "ignored rows are read",
            "limit_units = tl.where(kept, C_units, 0)",
            "limit_units = C_units",
            equivalent="slower: their gradients are 0 whatever is read",
        ),
        Change(
            "the sums of other rows",
            "(k * ROW_SUMS + i) * tl.cast(N, tl.int64) + n",
            "(k * ROW_SUMS + i) * tl.cast(N, tl.int64)",
        ),
        Change("the factor of the gradient is lost", "tl.where(valid, out * scale,", "tl.where(valid, out,"),
        Change(
            "sums of every weight have a launcher",
            "hard_weight=1.0, soft_weight=1.0, scale_by_t2=True",
            "scale_by_t2=True",
            tests=f"{SHARDS}::test_formulas_of_the_same_sums_share_a_launcher",
        ),
    ),
    *changes(
        "camkd_fast/backends/contract.py",
        f"{SHARDS}::test_masked_shards {SHARDS}::test_any_shards",
        Change(
            "given sums are written to", "return whole.clone(memory_format=torch.contiguous_format)", "return whole"
        ),
    ),
    *changes(
        "camkd_fast/losses/vocabulary.py",
        LINEAR,
        Change("labels from 0", "labels - self.start, _ELSEWHERE", "labels, _ELSEWHERE"),
        Change(
            "labels of the classes after these",
            "(labels < self.stop)",
            "(labels <= self.stop)",
            equivalent="the row op finds them outside its columns",
        ),
        Change("the caller's ignored label", "formula.replaced(ignore_index=_IGNORED)", "formula"),
        Change("labels of no process", "if labels.is_cpu and (wrong", "if labels.is_cuda and (wrong"),
        Change("mixtures of these classes", "            self.all_reduce(of_mixtures)\n", ""),
        Change("ranges are not compared", "        self._check_ranges(parts)\n", ""),
        Change("ranges are compared once on a CPU", "if parts.is_cuda and (", "if ("),
        Change("a gap between ranges", "if ranges[i][1] != ranges[j][0]:", "if ranges[i][1] > ranges[j][0]:"),
        Change("the first class is any", "if ranges[order[0]][0] != 0:", "if False:"),
        Change(
            "divergences of these classes",
            "sums[1:, CROSS], sums[1:, CENTER] = of_mixtures.unbind()",
            "sums[1:, CENTER] = of_mixtures[1]",
        ),
    ),
    *changes(
        "camkd_fast/losses/linear_chunks.py",
        LINEAR,
        Change(
            "hidden states of these classes",
            "if call.shard is not None and call.shard.reduce_input_grad and of_hidden",
            "if False and of_hidden",
        ),
        Change("hidden states of all classes in any case", "call.shard.reduce_input_grad and of_hidden", "of_hidden"),
        Change(
            "chunks by the own shard",
            "self.call.max_chunk_bytes if self.call.shard is None else math.inf",
            "self.call.max_chunk_bytes",
            equivalent="as long as no shard's chunk is larger; else processes wait for each other, which a test would, too",
        ),
        Change(
            "labels of these classes only",
            "self.vocab_size if self.shard is None else torch.iinfo(torch.int64).max",
            "self.vocab_size",
        ),
    ),
    *changes(
        "camkd_fast/losses/linear_checks.py",
        LINEAR,
        Change(
            "a range without a group", "if vocab_range is not None:\n            raise", "if False:\n            raise"
        ),
        Change("ranges of one class", "dist.get_rank(group) * rows", "dist.get_rank(group)"),
        Change("empty ranges", "if not 0 <= start < stop:", "if not 0 <= start <= stop:"),
    ),
)
