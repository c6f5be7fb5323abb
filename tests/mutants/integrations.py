"""Wrong changes of camkd_fast/integrations."""

from . import Change, changes

MODELS = "tests/integrations/test_causal_lm.py"
CHECK = "tests/integrations/test_logit_check.py"
TRAINER = "tests/integrations/test_trainer.py"
TRL = "tests/integrations/test_trl_trainer.py"

CHANGES = (
    *changes(
        "camkd_fast/integrations/causal_lm.py",
        CHECK,
        Change("a bias of a teacher left out", "teacher_biases=[own.bias for _, own in others],", "", tests=MODELS),
        Change("one size of logits is checked", "CHECKED_LOGITS = (1.0, 100.0)", "CHECKED_LOGITS = (1.0, 1.0)"),
        Change("large logits are checked only", "CHECKED_LOGITS = (1.0, 100.0)", "CHECKED_LOGITS = (100.0, 100.0)"),
        Change("factors beyond half precision", "factors.minimum(most)", "factors"),
        Change("logits of 0 are divided by", "torch.where(largest > 0, factors.minimum(most), 1.0)", "factors.minimum(most)"),
        Change("compiled code is checked", 'torch.compiler.set_stance("force_eager")', 'torch.no_grad()'),
        Change("an uncalled head is scaled", "head.logits(states * factors if called else states)",
               "head.logits(states * factors)"),
        Change("a config wants tuples", "own, inner.config.return_dict = inner.config.return_dict, True",
               "own = inner.config.return_dict"),
        Change("a backbone gives tuples", '"use_cache": False, "return_dict": True}', '"use_cache": False}'),
        Change("the head is read outside its forward", "at_head(model, states, keep)",
               "keep(states, output_head(model))"),
        Change("a backbone with a head", 'getattr(found, "get_output_embeddings", lambda: None)() is None', "found is not inner"),
    ),
    *changes(
        "camkd_fast/integrations/placement.py",
        CHECK,
        Change("placed models are not run", "return _is_whole(model) or (hooked and not is_sharded(model))",
               "return can_move(model)"),
        Change("offloaded models are not run", "hooked and not is_sharded(model)", "False"),
        Change("placed models are moved", 'getattr(unwrapped(model), "hf_device_map", None) is None', "True"),
    ),
    *changes(
        "camkd_fast/integrations/output_head.py",
        MODELS,
        Change("the softcap left out", "logit_scale(text), softcap(text))", "logit_scale(text), None)"),
        Change("logits multiplied by logits_scaling", 'return divisor if config.model_type == "hyperclovax" else 1.0 / divisor',
               "return divisor"),
        Change("a head's adapter is ignored", "if not head.merged:", "if False:"),
        Change("a head's own forward is ignored", "if type(layer).forward is not nn.Linear.forward:", "if False:", tests=CHECK),
        Change("a head's dtype is ignored", "not weight.is_floating_point() or ", "", tests=CHECK),
        Change("a head in FSDP2 has no bias of its own",
               "bias=None if self.bias is None else self.bias.clone()", "bias=self.bias",
               tests="tests/integrations/test_parallel.py"),
    ),
    *changes(
        "camkd_fast/integrations/wrappers.py",
        MODELS,
        Change("the wrapper is passed by", "return wrapper(*arguments)", "return inner(*arguments)"),
        Change("the instance's forward is lost", "vars(inner)[name] = own", "pass"),
        Change("accelerate's hooks are passed by", 'name = "_old_forward" if "_hf_hook" in vars(inner) else "forward"',
               'name = "forward"', tests=CHECK),
    ),
    *changes(
        "camkd_fast/integrations/teacher_mix.py",
        TRAINER,
        Change("a model passes for a list of teachers", "(list, tuple, nn.ModuleList, type(None))", "object"),
        Change("samples of other teachers run too", "if len(rows) == B or not selectable:", "if True:"),
        Change("images are selected as samples", "if len(rows) == B or not selectable:", "if len(rows) == B:"),
        Change("rows in the wrong places", "rows = used.nonzero().squeeze(-1)", "rows = used.nonzero().squeeze(-1).flip(0)",
               equivalent="the same rows are computed and put back, in another order"),
        Change("weights of other samples", "weights.unsqueeze(-1).expand", "weights.flip(1).unsqueeze(-1).expand"),
        Change("a shared parameter is none of the teacher's own", "own.issuperset(", "own.isdisjoint("),
        Change("vocab_size is not asked", "classes = vocab_size or classes_of_head(student)",
               "classes = classes_of_head(student)"),
    ),
    *changes(
        "camkd_fast/integrations/transformers.py",
        TRAINER,
        Change(
            "the number of items is not used",
            "num_items=divisor, **{",
            "num_items=None, **{",
        ),
        Change("labels that were shifted are shifted again", 'shift = "shift_labels" not in inputs', "shift = True"),
        Change("labels are counted as the model's class says",
               "self.model_accepts_loss_kwargs = self._loss_shifts_labels = True", "pass"),
        Change("the model is compiled, which does not run", "backbone(unwrapped(model)).compile(**options)", "pass"),
        Change("a router's loss of the config is lost", 'getattr(text, "output_router_logits", False) and coefficient',
               "False"),
        Change("no autocast", "with self.accelerator.autocast():", "if True:"),
        Change(
            "not scaled by the processes",
            "loss = loss * (self.accelerator.num_processes // self.get_tp_size())",
            "pass",
            tests="tests/integrations/test_parallel.py",
        ),
    ),
    *changes(
        "camkd_fast/integrations/trl.py",
        TRL,
        Change("the prompt's mask left out", 'counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)',
               'counted = inputs["completion_mask"]'),
        Change("teachers' states one token late", "found.states[:, -length - 1 : -1]", "found.states[:, -length:]"),
        Change(
            "T^2 in TRL's loss", "scale_by_t2=False, entropy=True,\n    )", "scale_by_t2=True, entropy=True,\n    )",
            tests="tests/integrations/test_trl_function.py",
        ),
    ),
    *changes(
        "camkd_fast/integrations/loss_metrics.py",
        TRAINER,
        Change("sums are not kept", "sums += self._sums", "pass"),
        Change("of one process only", 'accelerator.reduce(self._sums, reduction="sum")', "self._sums",
               tests="tests/integrations/test_parallel.py"),
    ),
)  # fmt: skip
