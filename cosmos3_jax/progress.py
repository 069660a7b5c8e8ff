"""A bar over the steps, moved from inside the compiled loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import tqdm


class Progress:
    """What a compiled loop calls back. One for all models: the compiled program keeps it alive."""

    bar: tqdm.tqdm | None = None

    def __call__(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update()


on_step = Progress()


@contextmanager
def bar(steps: int, shown: bool) -> Iterator[None]:
    """A bar that `on_step` moves."""
    if not shown:
        yield
        return
    with tqdm.tqdm(total=steps, unit="step", desc="denoise") as on_step.bar:
        yield
