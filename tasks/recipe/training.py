"""Sections of training: schedules, early stopping, distillation."""

from pydantic import Field

from tasks.recipe.section import Section


class Schedule(Section):
    """A linear warm-up from 0, then a linear decay from the peak to the final rate (AdamW)."""

    num_steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)  # the peak
    final_share: float = Field(ge=0, le=1)  # of the peaks, at the end
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)  # of the matrices of linear layers alone
    gradient_clip: float = Field(gt=0)  # the largest norm of the gradient
    log_every: int = Field(gt=0)
    save_every: int = Field(gt=0)  # a step checkpoint to go on from

    def peak(self, group: str) -> float:
        """The peak of one of `tasks.training.optimizer`'s groups of parameters."""
        return self.learning_rate

    def rate(self, step: int) -> float:
        """The share of the peaks at a step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.num_steps - step) / max(1, self.num_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * left


class TrainingPlan(Schedule):
    """A schedule in which the blocks' matrices learn by Muon, all else by AdamW."""

    matrix_learning_rate: float = Field(gt=0)  # the peak of the blocks' matrices

    def peak(self, group: str) -> float:
        return self.matrix_learning_rate if group == "blocks" else super().peak(group)


class FinetunePlan(TrainingPlan):
    """A training in which the heads that start fresh learn at a rate of their own."""

    head_learning_rate: float = Field(gt=0)

    def peak(self, group: str) -> float:
        return self.head_learning_rate if group == "fresh heads" else super().peak(group)


class EarlyStopping(Section):
    """Validate every so many steps; stop after `patience` validations without a better score."""

    validate_every: int = Field(gt=0)
    validation_examples: int = Field(gt=0)  # of each benchmark
    patience: int = Field(gt=0)


class Distillation(Section):
    """Learn from the parent's outputs, which needs no labels (`alloy.modality.objectives`)."""

    weight: float = Field(ge=0)  # 0: no distillation
