"""Numbers that say how far two results are apart, and the bars that they are held to.

In float32 the two differ by the order of their sums alone, and the bar is a number. In bfloat16
both round at every operation, by as much as the weights and inputs at hand make of it, so the bar
is the reference's own error: ours, against the reference in float32, may be `RATIO` times that.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

# Another order of the same roundings. Errors are pooled over inputs, as those of one scatter by a
# quarter; what is left of it is the rest of the allowance.
RATIO = 1.2
# A reference that is off by more than this in bfloat16 is broken (some oneDNN kernels are) and
# would excuse anything of ours.
NONSENSE = 0.3
# Ours in bfloat16 that is far closer to float32 than the reference was not computed in bfloat16.
# Measured between 0.78 and 1.03 of the reference's error; half of the steps sharp leaves 0.7.
FLOOR = 0.3
# Relative L2 error in float32. Measured on small models 1e-7 to 2e-6; sums at full width are up to
# a hundred times longer, and their rounding grows as the root of it.
FLOAT32 = {
    "operation": 1e-5,  # one layer, or what is around the layers, on the very same inputs
    "transformer": 1e-5,  # residual streams add the layers' errors up
    "video_vae": 5e-5,  # thirty convolutions deep
    "sound_vae": 5e-5,  # as deep, with exponentials and sines in between
    "sampler": 5e-6,  # the reference's coefficients are float32, ours float64
    "pipeline": 1e-4,  # guidance amplifies the transformer's error at every step
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: one result of one component, pooled over its inputs."""

    component: str
    case: str  # what was compared
    dtype: str  # of our computation
    shape: tuple[int, ...]  # of the reference's result, for one input
    inputs: int  # how many were pooled
    max_abs: float  # the largest difference of two values
    relative_l2: float  # |ours - reference| / |reference|
    cosine: float  # of the angle between the two
    psnr: float | None  # in dB, for pictures in [0, 1]
    reference_error: float | None  # its own relative L2 in bfloat16, against itself in float32
    bar: float  # the largest `relative_l2` that passes
    passed: bool
    note: str = ""  # why it failed, where the numbers do not say


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A tensor, or a step of the computation, at which the two differ."""

    component: str
    operation: str  # the public name of a tensor, or the step in words
    tensors: tuple[str, ...] = ()  # public names as stored, two under weight norm; none of a step
    leaf: str = ""  # where our parameter tree has the tensor
    relative_l2: float = np.inf
    bar: float = 0.0  # 0 for tensors that must be equal
    hint: str = ""  # what our tensor looks like instead
    alone: bool = True  # found on the reference's own inputs, so earlier errors do not add up

    def __str__(self) -> str:
        weights = f" [{', '.join(self.tensors)} -> {self.leaf}]" if self.tensors else ""
        hint = f"; {self.hint}" if self.hint else ""
        error = f"relative L2 {self.relative_l2:.1e}, bar {self.bar:.0e}"
        return f"{self.component}: {self.operation}{weights} ({error}{hint})"


@dataclasses.dataclass
class Outcome:
    """What the comparison of one component found."""

    component: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    # Tensors first, then steps in their order. A step that reads tensors that differ is left out.
    mismatches: list[Mismatch] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the JSON and the plots
    skipped: list[str] = dataclasses.field(default_factory=list)  # what, and why

    @property
    def passed(self) -> bool:
        return not self.mismatches and all(row.passed for row in self.rows)

    @property
    def first_failure(self) -> str:
        """The first mismatch, else the first row that failed, in words; "" if all passed."""
        if self.mismatches:
            return str(self.mismatches[0])
        for row in self.rows:
            if not row.passed:
                note = row.note or "every tensor and step in its bar: rounding, or how they combine"
                return f"{row.component}: {row.case} in {row.dtype}, {note}"
        return ""

    def add(self, operation: str, **what: Any) -> None:
        """A mismatch; see there."""
        self.mismatches.append(Mismatch(self.component, operation, **what))

    def check_step(self, step: str, ours: Any, exact: Any, bar: float, blame: bool = True) -> float:
        """Compare one step of the computation on the reference's own inputs.

        Args:
            step: in words.
            ours, exact: arrays of one shape, or it is a mismatch.
            bar: the largest relative L2 error that passes.
            blame: False notes the error alone, where tensors that the step reads differ.

        Returns:
            The error.
        """
        error = relative_l2(ours, exact)
        if np.shape(ours) != np.shape(exact):
            step += f": shape {np.shape(ours)} here, {np.shape(exact)} in the reference"
        self.details.setdefault("operations", []).append((step, error))
        known = any(step == mismatch.operation for mismatch in self.mismatches)  # by another input
        if blame and not known and not error <= bar:  # NaN misses every bar
            self.add(step, relative_l2=error, bar=bar)
        return error

    @contextlib.contextmanager
    def naming(self, step: str) -> Iterator[None]:
        """Shapes that do not fit in our computation are a mismatch of this step, and raised."""
        try:
            yield
        except (TypeError, ValueError) as error:
            self.add(f"{step}: {one_line(error)}")
            raise

    @contextlib.contextmanager
    def keeping_failures(self) -> Iterator[None]:
        """An exception ends the comparison. Where a verdict has failed by then, which may be the
        cause, the outcome stands and says so; otherwise the exception is raised.
        """
        try:
            yield
        except Exception as error:
            if self.passed:
                raise
            self.skipped.append(f"{self.component}: the rest, stopped by {one_line(error)}")


def one_line(error: Exception) -> str:
    """An error's kind and message without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def relative_l2(ours: Any, exact: Any) -> float:
    """|ours - exact| / |exact| in float64; against zeros 0 or infinity, as for other shapes."""
    if np.shape(ours) != np.shape(exact):
        return np.inf
    exact = np.asarray(exact, np.float64)
    error = float(np.linalg.norm(np.asarray(ours, np.float64) - exact))
    norm = float(np.linalg.norm(exact))
    return error / norm if norm else (0.0 if error == 0 else np.inf)


class Pool:
    """Results for several inputs, compared as if they were one array."""

    def __init__(self):
        self._ours, self._exact, self._low = [], [], []
        self.shape: tuple[int, ...] = ()
        self.note = ""

    def add(self, ours: Any, exact: Any, low: Any = None) -> None:
        """One input's result: ours, the reference's in float32 and, in bfloat16, its own there.

        Another shape than the reference's is infinitely far away.
        """
        self.shape = self.shape or np.shape(exact)
        if np.shape(ours) != np.shape(exact):
            self.note = f"whose shape is {np.shape(ours)} here, {np.shape(exact)} in the reference"
            ours = np.full(np.shape(exact), np.inf)
        self._ours.append(np.ravel(ours))
        self._exact.append(np.ravel(exact))
        if low is not None:
            self._low.append(np.ravel(low))

    @property
    def inputs(self) -> int:
        return len(self._exact)

    @property
    def relative_l2(self) -> float:
        """Of ours, over all inputs."""
        return relative_l2(np.concatenate(self._ours), np.concatenate(self._exact))

    @property
    def reference_error(self) -> float | None:
        """Of the reference in bfloat16, over all inputs; None if there was none."""
        if not self._low:
            return None
        return relative_l2(np.concatenate(self._low), np.concatenate(self._exact))

    def row(
        self, component: str, case: str, dtype: str, *, bar: float | None = None, picture=False
    ) -> Row:
        """The pool as a line, held to `bar`, the component's in float32, or the reference's own."""
        ours, exact = (np.float64(np.concatenate(x)) for x in (self._ours, self._exact))
        error, low, note = self.relative_l2, self.reference_error, self.note
        sane = low is None or (low <= NONSENSE and error >= FLOOR * low)
        if low is not None:
            bar = RATIO * low
            if error < FLOOR * low:
                note = note or f"less than {FLOOR} of the reference's error: not in {dtype} at all"
            elif low > NONSENSE:
                note = note or "where the reference itself is broken"
        elif bar is None:
            bar = FLOAT32[component]
        norms = np.linalg.norm(ours) * np.linalg.norm(exact)
        with np.errstate(invalid="ignore"):  # infinite values have no angle
            cosine = np.divide(ours @ exact, norms) if norms else not (ours.any() or exact.any())
        # In dB, of values in [0, 1], and no more than float32 can tell.
        psnr = float(-10 * np.log10(max(np.mean((ours - exact) ** 2), 2.0**-48)))
        return Row(
            component, case, dtype, tuple(int(n) for n in self.shape), self.inputs,
            max_abs=float(np.abs(ours - exact).max()), relative_l2=error, cosine=float(cosine),
            psnr=psnr if picture else None, reference_error=low, bar=bar,
            passed=bool(error <= bar and sane), note=note,  # NaN misses every bar
        )  # fmt: skip
