"""What a training shows on the screen: one bar with the loss in it, or plain lines where there is no terminal."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from .epochs import EpochCallback


__all__ = ["TrainingScreen", "add_callbacks"]


class TrainingScreen(ProgressCallback, PrinterCallback):
    """Shows a training: a bar on a terminal, a line for each log elsewhere; results of evaluations between.

    Where an epoch is a single step, as in the fast recipe, steps are counted and no epochs. It stands in the place of
    both callbacks that transformers has for this, so that removing one of them removes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None
        self.test_bar: Any = None
        self.is_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = state.is_world_process_zero
        if self.is_training and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.is_training:
            return
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.4g}"]
            if state.max_steps > state.num_train_epochs:
                parts.insert(0, f"epoch {max(1, round(state.epoch))} of {state.num_train_epochs}")
            self._show(", ".join(parts), state)
        for key in logs:
            if key.endswith("_accuracy"):
                self._line(self._scores(key.removesuffix("_accuracy"), logs), state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            if self.test_bar is None:  # not for what takes a moment, as all on kept embeddings does
                total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
                self.test_bar = tqdm(total=total, desc="Testing", leave=False, delay=1.0, dynamic_ncols=True)
            self.test_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close_test_bar()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close_test_bar()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = False
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _close_test_bar(self) -> None:
        if self.test_bar is not None:
            self.test_bar.close()
            self.test_bar = None

    def _show(self, text: str, state: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self._line(text, state)

    def _line(self, text: str, state: Any) -> None:
        if self.bar is not None:
            self.bar.write(f"step {state.global_step}: {text}", file=sys.stderr)
        else:
            print(f"step {state.global_step} of {state.max_steps}: {text}", file=sys.stderr, flush=True)

    @staticmethod
    def _scores(prefix: str, logs: dict) -> str:
        parts = [f"{prefix} accuracy {logs[f'{prefix}_accuracy']:.1%}"]
        if f"{prefix}_loss" in logs:
            parts.append(f"{prefix} loss {logs[f'{prefix}_loss']:.4g}")
        return ", ".join(parts)


def add_callbacks(trainer: Any) -> None:
    """Adds what goes by epochs, and [`TrainingScreen`] in the place of what transformers shows; its own display in
    notebooks stays."""
    trainer.add_callback(EpochCallback(trainer))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(TrainingScreen())
