"""The named faults that ``tests.mutants`` puts into the engine, its graphs and its noise."""

from __future__ import annotations

from tests.mutations import KERNELS, LOOP, STEP, Mutant

SERVING = "fastddim/serving"
MUTANTS = [
    Mutant(
        "serving",
        "noise belongs to a row's place in the tables",
        STEP,
        "number = np.int32(_floats(call.table, call.columns * number)[_NUMBER])",
        "number = np.int32(number)",
    ),
    Mutant(
        "serving",
        "the kernel draws for a row's place in the tables",
        KERNELS,
        "number = tl.load(table_ptr + row.to(tl.int64) * COLUMNS + 8).to(tl.int32)",
        "number = row",
    ),
    Mutant(
        "serving",
        "a first step of order 2 reads history",
        SERVING,
        "rows[1:, : _KAPPA + 1] = plan.second[order[1:]]",
        "rows[:, : _KAPPA + 1] = plan.second[order]",
    ),
    Mutant(
        "serving",
        "rows are numbered from start",
        SERVING,
        "rows[:, _KAPPA + 1] = order",
        "rows[:, _KAPPA + 1] = range(len(order))",
    ),
    Mutant(
        "serving",
        "a slot without a request keeps its state",
        SERVING,
        "here = self.x[self.side][slot].zero_()",
        "here = self.x[self.side][slot]",
    ),
    Mutant(
        "serving",
        "rows in use make room",
        SERVING,
        "for key in [key for key in self._places if not self._users.get(key)]:",
        "for key in list(self._places):",
    ),
    Mutant(
        "serving",
        "guidance keeps its first weight",
        SERVING,
        "if w[later] != w[step]:",
        "if False:",
    ),
    Mutant(
        "serving",
        "the condition replaces that of a neighbour",
        SERVING,
        "memory[slot].copy_(values[name], non_blocking=True)",
        "memory[slot - 1].copy_(values[name], non_blocking=True)",
    ),
    Mutant(
        "serving",
        "a warm-up moves the slots",
        SERVING,
        "        slots.moves.zero_()\n        try",
        "        try",
    ),
    Mutant(
        "serving",
        "a warm-up leaves its x0",
        SERVING,
        "slots.x0.copy_(x0)",
        "pass",
    ),
    Mutant(
        "serving",
        "a full queue takes one more",
        SERVING,
        "len(self._live) >= self._limit",
        "len(self._live) > self._limit",
    ),
    Mutant(
        "serving",
        "an interrupted tick is not mended",
        SERVING,
        "if not ticket.done() and ticket not in landing:",
        "if False:",
    ),
    Mutant(
        "serving",
        "a cancelled request keeps its slot",
        SERVING,
        "batches.free(ticket)\n            ticket.strip()",
        "ticket.strip()",
    ),
    Mutant(
        "loop",
        "a call on another stream does not wait",
        LOOP,
        "here.wait_stream(last)",
        "pass",
    ),
    Mutant(
        "loop",
        "a pool that lost its graphs is joined",
        LOOP,
        "if not self._graphs:",
        'if not hasattr(self, "_place"):',
    ),
    Mutant(
        "serving",
        "a tick's graph lets go of its weights",
        SERVING,
        "return holding(replay, self._predictor.model)",
        "return replay",
    ),
    Mutant(
        "serving",
        "a slot without a request keeps its conditions",
        SERVING,
        "memory[slot :: self._count].zero_()",
        "memory[slot :: self._count]",
    ),
    Mutant(
        "serving",
        "a failure that an interrupt kept back stays counted",
        SERVING,
        "self._delivery.begins_again(ticket)",
        "pass",
    ),
    Mutant(
        "serving",
        "a timeout awaits another thread's tick",
        SERVING,
        "timeout is not None and self._turn.locked()",
        "False",
    ),
    Mutant(
        "serving",
        "new work does not keep its engine",
        SERVING,
        "self._runner.kept = self\n            self._arrived",
        "pass\n            self._arrived",
    ),
]
