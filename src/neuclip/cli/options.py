"""Types of options that several commands share."""

from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

Switch = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
