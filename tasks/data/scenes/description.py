"""What scenes say of themselves: sizes, answers, classes (`tasks.data.sets.description`)."""

from tasks.data.scenes.words import ANSWERS, MAX_TOKENS, SEGMENTATION_CLASSES
from tasks.data.sets.description import Description
from tasks.recipe.experts import SceneParams


def scenes_description(params: SceneParams) -> Description:
    """The description of every benchmark on these scenes."""
    return Description(
        kind="questions",
        image_size=2 * params.cell_pixels,
        text_length=MAX_TOKENS,
        answers=ANSWERS,
        classes=SEGMENTATION_CLASSES,
    )
