"""The name of `alloy.modality` until 0.2: cards of released models import it."""

from alloy.modality import *  # noqa: F403
